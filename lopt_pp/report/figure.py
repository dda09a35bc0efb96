"""Pictures of runs for papers: what matplotlib draws, as PNG, PDF or SVG.

Curves are told apart in print without colours, too: by their dashes, and markers on what is measured now and then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt_pp.errors import LoptError, first_line
from lopt_pp.report.charts import Chart, Line, downsample, means
from lopt_pp.report.comparison import names_of, over
from lopt_pp.report.curves import chart_of, held_out_title, local_losses
from lopt_pp.report.run_data import RunData

_WIDTH, _HEIGHT, _COLUMNS = 3.3, 2.5, 3
"""Of a panel, in inches, and how many there are side by side."""

_STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_COLOURS = ("#1f4e9c", "#d9622b", "#16877a", "#8b4fc4", "#7a6210", "#4a4f57")
_MARKERS = ("o", "s", "^", "D", "v", "P")

_FEW = 60
"""Points up to which a curve has markers."""

_LOOK: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "savefig.dpi": 200,
    # Letters that stay letters in a PDF or SVG, which journals ask for.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


def draw_run(run: RunData, path: Path) -> None:
    """Draws a run's losses and the drift of its boundaries.

    Args:
        run: likewise.
        path: of the file; its suffix, .png, .pdf or .svg, says of what kind.

    Raises:
        LoptError: matplotlib is missing, or the file cannot be written.
    """
    last, stages = len(run.stages) - 1, range(len(run.stages) - 1)
    task = [Line("training", *run.curve(last, "loss"))]
    task += [Line(held_out_title(rows), *run.curve(last, name), dashed=True) for rows, name in run.held_out.items()]
    panels = [chart_of("loss", task)]
    for name in local_losses([run]):
        panels.append(chart_of(name, [Line(f"stage {stage}", *run.curve(stage, name)) for stage in stages]))
    drifts = [Line(f"after stage {stage}", *run.curve(stage, "drift_norm"), dashed=True) for stage in stages]
    _draw([*panels, chart_of("drift_norm", drifts)], path)


def draw_runs(runs: Sequence[RunData], path: Path) -> None:
    """Draws the task losses of several runs: on held-out rows, where there are some, and in training.

    Args:
        runs: likewise.
        path: as in `draw_run`.

    Raises:
        LoptError: matplotlib is missing, or the file cannot be written.
    """
    names = names_of(runs)

    def panel(title: str, of: Sequence[str], what: str, x_title: str, dashed: bool) -> Chart:
        lines = [
            Line(name, *over(run, loss, what), dashed=dashed) for name, run, loss in zip(names, runs, of, strict=True)
        ]
        return chart_of("loss", lines, title, x_title)

    panels = []
    for rows in sorted({rows for run in runs for rows in run.held_out}):
        title, of = f"Task loss, {held_out_title(rows)}", [run.held_out.get(rows, "") for run in runs]
        panels += [
            panel(title, of, what, x_title, True)
            for what, x_title in (("", "step"), ("step_seconds", "seconds in steps"))
        ]
    panels.append(panel("Task loss, training", ["loss"] * len(runs), "", "step", False))
    _draw(panels, path)


def _draw(charts: Sequence[Chart], path: Path) -> None:
    try:
        # Late, since few want a picture.
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LoptError(
            f"--png {path} needs matplotlib ({first_line(error)}): pip install 'lopt-pp[insight]'"
        ) from error
    shown = [chart for chart in charts if chart.drawn]
    if not shown:
        raise LoptError(f"--png {path}: there is no loss to draw in any of the runs")
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    with matplotlib.rc_context(_LOOK):
        figure = Figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
        for axes, chart in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
            _panel(axes, chart)
        for axes in figure.axes[len(shown) :]:
            axes.set_axis_off()
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise LoptError(f"--png {path} cannot be written: {error.strerror}") from error


def _panel(axes: Any, chart: Chart) -> None:
    scale = 100 if chart.percent else 1
    for number, line in enumerate(chart.lines):
        if not line.xs:
            continue
        colour, style = _COLOURS[number % len(_COLOURS)], _STYLES[number % len(_STYLES)]
        few = downsample(line)
        xs, ys = few.xs, [scale * y for y in few.ys]
        has_markers = line.dashed and len(xs) <= _FEW
        if chart.smooth and not line.dashed and len(xs) > 8:
            axes.plot(xs, ys, color=colour, alpha=0.2, linewidth=0.7)
            ys = means(ys)
        marker = _MARKERS[number % len(_MARKERS)] if has_markers or len(xs) == 1 else None
        axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, markersize=3.5, label=line.name)
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x_title)
    axes.set_ylabel(f"% {chart.unit.removeprefix('share ')}".strip() if chart.percent else chart.unit)
    axes.legend()

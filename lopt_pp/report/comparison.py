"""The page that overlays several runs."""

from collections.abc import Callable, Sequence

from lopt_pp.config.train_config import EFFECTS
from lopt_pp.report.charts import Chart, Line, number
from lopt_pp.report.curves import chart_of, held_out_title, in_words, local_losses
from lopt_pp.report.page import Page, Section, render
from lopt_pp.report.results import Results, best_of, results
from lopt_pp.report.run_data import Curve, RunData
from lopt_pp.report.run_report import PHASE_NAMES, shares_of
from lopt_pp.report.state import duration

_Lines = Callable[[Callable[[RunData], Curve]], list[Line]]
"""The curves of all runs, from what gives that of one."""

AXES = {"": "step", "step_seconds": "seconds in steps", "num_tokens": "tokens"}
"""What losses are drawn over, by the value of a record that adds up to it; empty for the steps themselves."""


def compare(runs: Sequence[RunData]) -> str:
    """The page, as HTML."""
    names, found = names_of(runs), [results(run) for run in runs]

    def lines(curve: Callable[[RunData], Curve]) -> list[Line]:
        return [Line(name, *curve(run), colour=at) for at, (name, run) in enumerate(zip(names, runs, strict=True))]

    bars = [
        (f"{name}, stage {stage}", shares_of(run.times(stage)))
        for name, run in zip(names, runs, strict=True)
        for stage in range(len(run.stages))
    ]
    sections = [
        Section("At a glance", table=_table(names, found)),
        Section("Held-out losses", charts=_held_out_charts(runs, lines)),
        Section("Losses", charts=_loss_charts(runs, lines)),
        Section("Boundaries", charts=_drift_charts(runs, lines)),
        Section("Speed", charts=_speed_charts(lines)),
        Section(
            "Where time went",
            "Of the mean step of each stage, without the first tenth of the steps.",
            bars=bars,
            bar_names={
                phase: name for phase, name in PHASE_NAMES.items() if any(bar[phase] > 0.0005 for _, bar in bars)
            },
        ),
        Section("What differs", "Flags that are not the same in all runs.", table=_differences(names, runs)),
    ]
    return render(Page(" · ".join(names), f"{len(runs)} runs", _tiles(names, found), sections))


def names_of(runs: Sequence[RunData]) -> list[str]:
    """Of each run; its directory where two have one name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.directory) for name, run in zip(names, runs, strict=True)]


def differing_flags(runs: Sequence[RunData]) -> list[str]:
    """The flags that are not the same in all runs, of those that count in a comparison."""
    ignored = {name for name, effects in EFFECTS.items() if not effects.compared}
    flags = dict.fromkeys(name for run in runs for name in run.flags if name not in ignored)
    return [flag for flag in flags if len({str(run.flags.get(flag)) for run in runs}) > 1]


def over(run: RunData, name: str, what: str) -> Curve:
    """A value of the last stage, over the sum of another one over the steps so far; over the steps where that is ''."""
    steps, values = run.curve(len(run.stages) - 1, name)
    if not what:
        return steps, values
    sums, total = {0.0: 0.0}, 0.0
    for record in run.stages[-1]:
        total += record[what]
        sums[record["step"]] = total
    return [sums[step] for step in steps], values


def _held_out_charts(runs: Sequence[RunData], lines: _Lines) -> list[Chart]:
    sets = sorted({rows for run in runs for rows in run.held_out})
    return [
        _loss_chart(
            f"Task loss, {held_out_title(rows)}",
            lines(lambda run, rows=rows, what=what: over(run, run.held_out.get(rows, ""), what)),  # type: ignore[misc]
            what,
        )
        for rows in sets
        for what in AXES
    ]


def _loss_charts(runs: Sequence[RunData], lines: _Lines) -> list[Chart]:
    stages = range(max(len(run.stages) for run in runs) - 1)
    return [
        *(_loss_chart("Task loss", lines(lambda run, what=what: over(run, "loss", what)), what) for what in AXES),  # type: ignore[misc]
        *(
            chart_of(
                name,
                lines(lambda run, stage=stage, name=name: _of_stage(run, stage, name)),  # type: ignore[misc]
                f"{in_words(name)}, stage {stage}",
            )
            for stage in stages
            for name in local_losses(runs)
        ),
    ]


def _loss_chart(title: str, lines: Sequence[Line], what: str) -> Chart:
    words = {"": "", "step_seconds": " over time", "num_tokens": " over tokens"}[what]
    return chart_of("loss", lines, f"{title}{words}", AXES[what])


def _drift_charts(runs: Sequence[RunData], lines: _Lines) -> list[Chart]:
    return [
        chart_of(
            "drift_norm",
            lines(lambda run, stage=stage: _of_stage(run, stage, "drift_norm")),  # type: ignore[misc]
            f"Drift after stage {stage}",
        )
        for stage in range(max(len(run.stages) for run in runs) - 1)
    ]


def _speed_charts(lines: _Lines) -> list[Chart]:
    return [
        chart_of("tokens_per_second", lines(lambda run: over(run, "tokens_per_second", ""))),
        chart_of("grad_norm", lines(lambda run: over(run, "grad_norm", "")), "Gradient norm of the last stage"),
    ]


def _of_stage(run: RunData, stage: int, name: str) -> Curve:
    """Empty where the run has no such stage."""
    return run.curve(stage, name) if stage < len(run.stages) else ([], [])


def _tiles(names: Sequence[str], found: Sequence[Results]) -> list[tuple[str, str, str]]:
    """The run that ends best, and what it has come to."""
    best = best_of(found)
    if best is None:
        return []
    at, rows = best
    result, loss = found[at], "lowest training loss"
    tiles = []
    if rows is not None:
        held_out, loss = result.held_out[rows], "lowest held-out loss" + (f" on {rows}" if rows else "")
        first = f"from {number(held_out.first)} at step {held_out.first_step}"
        tiles.append((f"Task loss, {held_out_title(rows)}", number(held_out.saved), first))
        tiles.append(("At step", str(held_out.saved_step), f"of {result.steps} steps"))
    elif result.loss is not None:
        tiles.append(("Task loss", number(result.loss), "in training, last steps"))
        tiles.append(("Steps", str(result.steps), ""))
    return [
        ("Best run", names[at], loss),
        *tiles,
        ("Time in steps", duration(result.seconds), ""),
        ("Tokens", number(result.tokens), f"{number(result.tokens_per_second)} tokens/s"),
        ("Most memory", f"{result.peak_memory_bytes / 2**20:.0f} MiB", "of a process"),
    ]


def _table(names: Sequence[str], found: Sequence[Results]) -> list[list[str]]:
    sets = sorted({rows for one in found for rows in one.held_out})
    head = ["run", *(title for rows in sets for title in (f"loss {held_out_title(rows)}", "at step", "first"))]
    head += ["training loss", "lowest", "steps", "in steps", "tokens", "tokens/s", "busiest stage computes"]
    rows_of_cells = [[*head, "most memory"]]
    for name, one in zip(names, found, strict=True):
        cells = [name]
        for rows in sets:
            held_out = one.held_out.get(rows)
            cells += (
                ["", "", ""]
                if held_out is None
                else [number(held_out.saved), str(held_out.saved_step), number(held_out.first)]
            )
        cells += ["" if loss is None else number(loss) for loss in (one.loss, one.lowest_loss)]
        cells += [str(one.steps), f"{one.seconds:.0f} s", number(one.tokens), number(one.tokens_per_second)]
        rows_of_cells.append([*cells, f"{one.computing_share:.1%}", f"{one.peak_memory_bytes / 2**20:.0f} MiB"])
    return rows_of_cells


def _differences(names: Sequence[str], runs: Sequence[RunData]) -> list[list[str]]:
    rows = [[f"--{flag}", *(str(run.flags.get(flag, "")) for run in runs)] for flag in differing_flags(runs)]
    return [["flag", *names], *rows] if rows else []

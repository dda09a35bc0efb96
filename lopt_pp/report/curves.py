"""Which charts are drawn of the values in a run's records.

A value that nothing here knows gets a chart by itself, of the stages that have it: who adds one to the records need not
come here, unless its chart is to have a unit, or to show shares (`MEASURES`). Names with a `/`, as TRL's trainers give
them (`rewards/chosen`, `rewards/rejected`), are curves of one chart; `eval_` before a name makes it a dashed one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lopt_pp.metrics.records import is_measured
from lopt_pp.report.charts import Chart, Line
from lopt_pp.report.page import Section
from lopt_pp.report.run_data import RunData


@dataclass(frozen=True)
class Measure:
    """How values of a name are drawn.

    Attributes:
        unit: of the values.
        title: of the chart; by default the name in words.
        percent: whether values are shares.
        from_zero: whether the axis begins at 0.
        smooth: whether the curve is a running mean.
        note: below the chart.
    """

    unit: str = ""
    title: str = ""
    percent: bool = False
    from_zero: bool = False
    smooth: bool = True
    note: str = ""


NATS = "nats per token"

MEASURES = {
    "loss": Measure(NATS, "Task loss"),
    "reconstruction_loss": Measure("mean squared error"),
    "auxiliary_loss": Measure(NATS),
    "learning_rate": Measure(from_zero=True, smooth=False),
    "grad_norm": Measure(title="Gradient norm, before clipping"),
    "drift_norm": Measure("share of the norm", "Drift of the boundary", percent=True, from_zero=True, smooth=False),
    "drift_cosine": Measure(title="Cosine with the pretrained model's", smooth=False),
    "tokens_per_second": Measure("tokens/s", "Throughput", from_zero=True),
    "queue_length": Measure(
        "microbatches",
        "Queue after the stage",
        from_zero=True,
        note="Those that wait for the next stage when the stage has another one ready.",
    ),
    "mfu": Measure(title="Model FLOPs utilization", percent=True, from_zero=True),
    "accuracy": Measure(percent=True),
    "mean_token_accuracy": Measure(percent=True),
}
"""By the name of a value, or by what stands before its `/`."""

_DRAWN_ELSEWHERE = {"loss", "learning_rate", "grad_norm", "drift_norm", "drift_cosine", "tokens_per_second"}
_DRAWN_ELSEWHERE |= {"queue_length", "mfu"}
_NOT_DRAWN = {"step", "stage", "epoch", "num_tokens", "num_targets", "peak_memory_bytes", "perplexity"}

DRIFT_NOTE = (
    "How far the hidden states that leave a stage have moved from those of the pretrained model, on a few fixed rows: "
    "the norm of the difference over their norm, and the cosine of the two, on the mean over tokens."
)


def curve_sections(run: RunData) -> list[Section]:
    """The charts of a run, under their headings."""
    return [
        Section("Losses", charts=_loss_charts(run)),
        Section("Metrics", "What else the run has measured of its rows.", charts=_other_charts(run)),
        Section("Boundaries", DRIFT_NOTE, charts=_drift_charts(run)),
        Section("Speed", charts=_speed_charts(run)),
    ]


def chart_of(name: str, lines: Sequence[Line], title: str = "", x_title: str = "step") -> Chart:
    """The chart of values of a name, as `MEASURES` has it."""
    measure = MEASURES.get(name, Measure())
    return Chart(
        title or measure.title or in_words(name),
        lines,
        measure.unit,
        x_title=x_title,
        note=measure.note,
        percent=measure.percent,
        from_zero=measure.from_zero,
        smooth=measure.smooth,
    )


def in_words(name: str) -> str:
    """A value's name as a title."""
    return name.replace("_", " ").strip().capitalize()


def held_out_title(name: str) -> str:
    """What the curve of a set of held-out rows is called."""
    return f"held out, {name}" if name else "held out"


def local_losses(runs: Sequence[RunData]) -> list[str]:
    """The names of the earlier stages' own losses."""
    found = (run.local_loss(stage) for run in runs for stage in range(len(run.stages) - 1))
    return sorted({name for name in found if name is not None})


def _lines(run: RunData, name: str, stages: Sequence[int] | None = None) -> list[Line]:
    stages = range(len(run.stages)) if stages is None else stages
    return [Line(f"stage {stage}", *run.curve(stage, name), colour=stage) for stage in stages]


def _loss_charts(run: RunData) -> list[Chart]:
    last = len(run.stages) - 1
    task = [Line("training", *run.curve(last, "loss"), colour=last)]
    for number, (called, name) in enumerate(run.held_out.items(), 1):
        task.append(Line(held_out_title(called), *run.curve(last, name), colour=last + number, dashed=True))
    return [
        chart_of("loss", task),
        *(chart_of(name, _lines(run, name)) for name in local_losses([run])),
        chart_of("learning_rate", _lines(run, "learning_rate")),
        chart_of("grad_norm", _lines(run, "grad_norm")),
    ]


def _drift_charts(run: RunData) -> list[Chart]:
    return [
        chart_of(
            name,
            [
                Line(f"after stage {stage}", *run.curve(stage, name), colour=stage)
                for stage in range(len(run.stages) - 1)
            ],
        )
        for name in ("drift_norm", "drift_cosine")
    ]


def _speed_charts(run: RunData) -> list[Chart]:
    stages = range(len(run.stages))
    computing = [Line(f"stage {stage}", *run.share_curve(stage, "computing"), colour=stage) for stage in stages]
    return [
        chart_of("tokens_per_second", _lines(run, "tokens_per_second", [len(run.stages) - 1])),
        Chart("Time spent computing", computing, percent=True, from_zero=True),
        # Stages that share a process hand over without a queue.
        chart_of("queue_length", _lines(run, "queue_length") if len(run.stages_of_processes) > 1 else []),
        chart_of("mfu", _lines(run, "mfu")),
    ]


@dataclass
class _Group:
    """The values that share a chart: by curve, the stages that have it."""

    curves: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    """By the value's name, the part after its `/`, and the set of held-out rows that it is of (`-` for training)."""


def _other_charts(run: RunData) -> list[Chart]:
    known = _DRAWN_ELSEWHERE | _NOT_DRAWN | {*local_losses([run])}
    groups: dict[str, _Group] = {}
    for stage in range(len(run.stages)):
        for name in run.names(stage):
            what, rows = _told_apart(run, name)
            is_drawn = what in known or what.endswith("_seconds") or (rows != "-" and what.endswith("loss"))
            if is_drawn or not any(_is_number(record.get(name)) for record in _records(run, stage)):
                continue
            chart, _, part = what.partition("/")
            groups.setdefault(chart, _Group()).curves.setdefault((name, part, rows), []).append(stage)
    return [chart_of(name, _other_lines(run, group)) for name, group in groups.items()]


def _told_apart(run: RunData, name: str) -> tuple[str, str]:
    """What is measured, and on which set of held-out rows; `-` for the training rows."""
    if not is_measured(name):
        return name, "-"
    what = name.removeprefix("eval_")
    for rows in sorted(run.held_out, key=len, reverse=True):
        if rows and what.startswith(f"{rows}_"):
            return what.removeprefix(f"{rows}_"), rows
    return what, ""


def _other_lines(run: RunData, group: _Group) -> list[Line]:
    lines: list[Line] = []
    for (name, part, rows), stages in group.curves.items():
        for stage in stages:
            words = [part.replace("_", " ")] if part else []
            words += [f"stage {stage}"] if len(stages) > 1 or not (part or rows != "-") else []
            words += [held_out_title(rows)] if rows != "-" else []
            steps, values = run.curve(stage, name)
            numbers = [(step, value) for step, value in zip(steps, values, strict=True) if _is_number(value)]
            xs, ys = [step for step, _ in numbers], [float(value) for _, value in numbers]
            lines.append(Line(", ".join(words), xs, ys, colour=len(lines), dashed=rows != "-"))
    return lines


def _records(run: RunData, stage: int) -> Sequence[dict[str, object]]:
    return (*run.start[stage : stage + 1], *run.stages[stage])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

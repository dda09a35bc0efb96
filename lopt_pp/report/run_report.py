"""The page on a run: curves, timeline and advice."""

from collections.abc import Sequence

from lopt_pp.metrics.records import COMPUTE_PHASES
from lopt_pp.report.advice import advise
from lopt_pp.report.charts import Chart, Line, number, timeline
from lopt_pp.report.page import Section, render
from lopt_pp.report.run_data import RunData, StageTimes

PHASE_NAMES = {
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "schedule": "1F1B schedule, waits included",
    "wait_receive": "waiting to receive",
    "wait_send": "waiting to send",
    "probe": "probe",
    "eval": "evaluation",
    "other": "data and bookkeeping",
}
"""Of what a stage's time goes to, in the order of the bars."""


UNITS = {"reconstruction_loss": "mean squared error", "auxiliary_loss": "nats per token"}
"""Of local losses."""


def report(run: RunData) -> str:
    """The page on a run, as HTML."""
    times = [run.times(stage) for stage in range(len(run.stages))]
    sections = [
        Section("What to make of it", advice=advise(run)),
        Section("Losses", charts=_loss_charts(run)),
        Section("Interfaces", _DRIFT_NOTE, charts=_drift_charts(run)),
        Section("Speed", charts=_speed_charts(run)),
        Section(
            "Where time went",
            "Of the mean step of each stage, without the first tenth of the steps.",
            bars=[(_stage_name(run, time.stage), shares_of(time)) for time in times],
            bar_names=_names_in([shares_of(time) for time in times]),
        ),
        Section(
            "The pipeline over time",
            "The first steps of trace.json, a row for each stage, on one clock; every other step is paler.",
            picture=timeline(run.trace),
            picture_names={phase: name for phase, name in PHASE_NAMES.items() if phase in _traced(run)},
        ),
        Section("Stages", table=_where(run, times)),
        Section(
            "Configuration",
            pairs={f"--{name}": _value(value) for name, value in run.flags.items()},
            pairs_title=f"All {len(run.flags)} flags",
        ),
    ]
    return render(run.name, _subtitle(run), _tiles(run, times), sections)


_DRIFT_NOTE = (
    "How far the hidden states that leave a stage have moved from those of the pretrained model, on a few fixed rows: "
    "the norm of the difference over their norm, and the cosine of the two, on the mean over tokens."
)


def shares_of(time: StageTimes) -> dict[str, float]:
    """The shares of a stage's time, in the order of the bars."""
    return {phase: time.share(phase) for phase in PHASE_NAMES}


def _traced(run: RunData) -> set[str]:
    return {event["cat"] for event in run.trace if event["ph"] == "X"}


def _names_in(bars: Sequence[dict[str, float]]) -> dict[str, str]:
    return {phase: name for phase, name in PHASE_NAMES.items() if any(bar[phase] > 0.0005 for bar in bars)}


def _subtitle(run: RunData) -> str:
    about = run.about
    parts = [f"{run.flags['model_name_or_path']} ({about['model_class']})"] if "model_class" in about else []
    if "rows" in about:
        parts.append(about["rows"])
    if "started" in about:
        parts.append(f"started {about['started']}")
    if "versions" in about:
        parts.append(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    return " · ".join(parts) or str(run.directory)


def _tiles(run: RunData, times: Sequence[StageTimes]) -> list[tuple[str, str, str]]:
    planned = run.about.get("num_steps")
    state = f"of {planned}" if planned else ""
    if run.stopped is not None:
        state += f", stopped by {run.stopped.get('signal', 'a signal')}"
    elif "finished_early" in run.about:
        state += ", finished early"
    minutes, seconds = divmod(round(run.seconds), 60)
    tiles = [("Steps", str(run.steps), state), ("Time in steps", f"{minutes} min {seconds:02d} s", "")]
    for stage, name in ((len(run.stages) - 1, "loss"), (0, "reconstruction_loss")):
        _, values = run.curve(stage, name)
        if values:
            called = (
                "Task loss" if name == "loss" else f"Reconstruction loss{', stage 0' if len(run.stages) > 2 else ''}"
            )
            few = max(1, len(values) // 20)
            first, last = (sum(part) / few for part in (values[:few], values[-few:]))
            tiles.append((called, number(last), f"from {number(first)}"))
    tiles.append(("Speed", number(run.tokens_per_second), "tokens/s"))
    if not any(time.seconds["schedule"] for time in times):
        tiles.append(("Computing", f"{max(time.computing_share for time in times):.1%}", "of the time, busiest stage"))
    return tiles


def _stage_name(run: RunData, stage: int) -> str:
    if (layers := run.layers) is None:
        return f"stage {stage}"
    start, stop = layers[stage]
    return f"stage {stage}, layers {start}–{stop - 1}"


def _lines(run: RunData, name: str, stages: Sequence[int] | None = None) -> list[Line]:
    stages = range(len(run.stages)) if stages is None else stages
    return [Line(f"stage {stage}", *run.curve(stage, name), colour=stage) for stage in stages]


def _loss_charts(run: RunData) -> list[Chart]:
    last = len(run.stages) - 1
    task = [Line("training", *run.curve(last, "loss"), colour=last)]
    task.append(Line("held out", *run.curve(last, "eval_loss"), colour=last + 1, dashed=True))
    return [
        Chart("Task loss", task, "nats per token"),
        *(Chart(loss_title(name), _lines(run, name), UNITS.get(name, "")) for name in local_losses([run])),
        Chart("Learning rate", _lines(run, "learning_rate"), from_zero=True, smooth=False),
        Chart("Gradient norm, before clipping", _lines(run, "grad_norm")),
    ]


def local_losses(runs: Sequence[RunData]) -> list[str]:
    """The names of the earlier stages' own losses."""
    found = (run.local_loss(stage) for run in runs for stage in range(len(run.stages) - 1))
    return sorted({name for name in found if name is not None})


def loss_title(name: str) -> str:
    """What a loss is called above a chart."""
    return f"{name.removesuffix('_loss').replace('_', ' ').capitalize()} loss"


def _drift_charts(run: RunData) -> list[Chart]:
    named = [(stage, f"after stage {stage}") for stage in range(len(run.stages) - 1)]
    norms, cosines = (
        [Line(called, *run.curve(stage, name), colour=stage) for stage, called in named]
        for name in ("drift_norm", "drift_cosine")
    )
    return [
        Chart("Drift of the boundary", norms, "share of the norm", percent=True, from_zero=True, smooth=False),
        Chart("Cosine with the pretrained model's", cosines, smooth=False),
    ]


def _speed_charts(run: RunData) -> list[Chart]:
    stages = range(len(run.stages))
    computing = [Line(f"stage {stage}", *run.share_curve(stage, "computing"), colour=stage) for stage in stages]
    return [
        Chart("Throughput", _lines(run, "tokens_per_second", [len(run.stages) - 1]), "tokens/s", from_zero=True),
        Chart("Time spent computing", computing, percent=True, from_zero=True),
        Chart(
            "Queue after the stage",
            # Stages that share a process hand over without one.
            _lines(run, "queue_length") if len(run.stages_of_processes) > 1 else [],
            "microbatches",
            from_zero=True,
            note="Those that wait for the next stage when the stage has another one ready.",
        ),
        Chart("Model FLOPs utilization", _lines(run, "mfu"), percent=True, from_zero=True),
    ]


def _where(run: RunData, times: Sequence[StageTimes]) -> list[list[str]]:
    places = {
        stage["stage"]: (process["device"], process["host"], stage["parameters"])
        for process in reversed(run.about.get("processes", []))
        for stage in process["stages"]
    }
    rows = [["stage", "parameters", "step", "computing", "waits to receive", "waits to send", "peak memory", "device"]]
    for time in times:
        device, host, parameters = places.get(time.stage, ("", "", None))
        memory = max(record.get("peak_memory_bytes", 0) for record in run.stages[time.stage])
        computing = sum(time.seconds[phase] for phase in COMPUTE_PHASES)
        rows.append(
            [
                _stage_name(run, time.stage),
                number(parameters) if parameters is not None else "",
                f"{time.wall:.3f} s",
                f"{computing:.3f} s" if not time.seconds["schedule"] else "",
                f"{time.seconds['wait_receive']:.3f} s",
                f"{time.seconds['wait_send']:.3f} s",
                f"{memory / 2**20:.0f} MiB",
                f"{device} on {host}" if device else "",
            ]
        )
    return rows


def _value(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

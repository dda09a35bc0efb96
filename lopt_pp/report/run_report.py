"""The page on a run: curves, timeline and advice."""

from collections.abc import Sequence

from lopt_pp.metrics.records import COMPUTE_PHASES
from lopt_pp.report.advice import advise
from lopt_pp.report.charts import number
from lopt_pp.report.curves import curve_sections, held_out_title
from lopt_pp.report.page import Page, Section, render
from lopt_pp.report.run_data import RunData, StageTimes
from lopt_pp.report.state import State
from lopt_pp.report.timeline import timeline

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


def report(run: RunData, state: State | None = None) -> str:
    """The page on a run, as HTML; `state` is that of the run, if known."""
    return render(run_page(run, state))


def run_page(run: RunData, state: State | None = None) -> Page:
    """What the page on a run shows."""
    times = [run.times(stage) for stage in range(len(run.stages))]
    sections = [
        Section("What to make of it", advice=advise(run)),
        *curve_sections(run),
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
    return Page(run.name, _subtitle(run), _tiles(run, times), sections, state)


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
    for rows, name in run.held_out.items():
        steps, values = run.curve(len(run.stages) - 1, name)
        if values:
            since = f"from {number(values[0])} at step {steps[0]}" if len(values) > 1 else f"at step {steps[0]}"
            tiles.append((f"Task loss, {held_out_title(rows)}", number(values[-1]), since))
    tiles.append(("Speed", number(run.tokens_per_second), "tokens/s"))
    if not any(time.seconds["schedule"] for time in times):
        tiles.append(("Computing", f"{max(time.computing_share for time in times):.1%}", "of the time, busiest stage"))
    return tiles


def _stage_name(run: RunData, stage: int) -> str:
    if (layers := run.layers) is None:
        return f"stage {stage}"
    start, stop = layers[stage]
    return f"stage {stage}, layers {start}–{stop - 1}"


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

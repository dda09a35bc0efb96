"""The page that overlays several runs."""

from collections.abc import Callable, Sequence

from lopt_pp.config.train_config import EFFECTS
from lopt_pp.report.charts import Chart, Line, number
from lopt_pp.report.curves import chart_of, in_words, local_losses
from lopt_pp.report.page import Page, Section, render
from lopt_pp.report.run_data import Curve, RunData
from lopt_pp.report.run_report import PHASE_NAMES, shares_of


def compare(runs: Sequence[RunData]) -> str:
    """The page, as HTML."""
    names = _names(runs)

    def lines(curve: Callable[[RunData], Curve]) -> list[Line]:
        return [Line(name, *curve(run), colour=at) for at, (name, run) in enumerate(zip(names, runs, strict=True))]

    last = [len(run.stages) - 1 for run in runs]
    stages = range(max(last))
    bars = [
        (f"{name}, stage {stage}", shares_of(run.times(stage)))
        for name, run in zip(names, runs, strict=True)
        for stage in range(len(run.stages))
    ]
    sections = [
        Section("At a glance", table=_table(names, runs)),
        Section(
            "Losses",
            charts=[
                Chart("Task loss", lines(lambda run: run.curve(len(run.stages) - 1, "loss")), "nats per token"),
                Chart("Task loss over time", lines(_over_time), "nats per token", x_title="seconds in steps"),
                Chart("Task loss over tokens", lines(_over_tokens), "nats per token", x_title="tokens"),
                *(
                    chart_of(
                        name,
                        lines(lambda run, stage=stage, name=name: _of_stage(run, stage, name)),  # type: ignore[misc]
                        f"{in_words(name)}, stage {stage}",
                    )
                    for stage in stages
                    for name in local_losses(runs)
                ),
            ],
        ),
        Section(
            "Interfaces",
            charts=[
                Chart(
                    f"Drift after stage {stage}",
                    lines(lambda run, stage=stage: _of_stage(run, stage, "drift_norm")),  # type: ignore[misc]
                    "share of the norm",
                    percent=True,
                    from_zero=True,
                    smooth=False,
                )
                for stage in stages
            ],
        ),
        Section(
            "Speed",
            charts=[
                Chart(
                    "Throughput",
                    lines(lambda run: run.curve(len(run.stages) - 1, "tokens_per_second")),
                    "tokens/s",
                    from_zero=True,
                ),
                Chart(
                    "Gradient norm of the last stage",
                    lines(lambda run: run.curve(len(run.stages) - 1, "grad_norm")),
                ),
            ],
        ),
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
    return render(Page(" · ".join(names), f"{len(runs)} runs", sections=sections))


def _names(runs: Sequence[RunData]) -> list[str]:
    """Of each run; its directory where two have one name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.directory) for name, run in zip(names, runs, strict=True)]


def _of_stage(run: RunData, stage: int, name: str) -> Curve:
    """Empty where the run has no such stage."""
    return run.curve(stage, name) if stage < len(run.stages) else ([], [])


def _over_time(run: RunData) -> Curve:
    return _over(run, "step_seconds")


def _over_tokens(run: RunData) -> Curve:
    return _over(run, "num_tokens")


def _over(run: RunData, what: str) -> Curve:
    """The task loss over the sum of something over the steps so far."""
    sums, total = [], 0.0
    for record in run.stages[-1]:
        total += record[what]
        sums.append(total)
    return sums, [record["loss"] for record in run.stages[-1]]


def _table(names: Sequence[str], runs: Sequence[RunData]) -> list[list[str]]:
    rows = [["run", "steps", "in steps", "tokens/s", "task loss", "lowest", "busiest stage computes", "most memory"]]
    for name, run in zip(names, runs, strict=True):
        losses = run.curve(len(run.stages) - 1, "loss")[1]
        few = max(1, len(losses) // 20)
        times = [run.times(stage) for stage in range(len(run.stages))]
        memory = max(record.get("peak_memory_bytes", 0) for records in run.stages for record in records)
        rows.append(
            [
                name,
                str(run.steps),
                f"{run.seconds:.0f} s",
                number(run.tokens_per_second),
                number(sum(losses[-few:]) / few) if losses else "",
                number(min(losses)) if losses else "",
                f"{max(time.computing_share for time in times):.1%}",
                f"{memory / 2**20:.0f} MiB",
            ]
        )
    return rows


def _differences(names: Sequence[str], runs: Sequence[RunData]) -> list[list[str]]:
    ignored = {name for name, effects in EFFECTS.items() if not effects.compared}
    flags = {name: None for run in runs for name in run.flags if name not in ignored}
    rows = [
        [f"--{flag}", *(str(run.flags.get(flag, "")) for run in runs)]
        for flag in flags
        if len({str(run.flags.get(flag)) for run in runs}) > 1
    ]
    return [["flag", *names], *rows] if rows else []

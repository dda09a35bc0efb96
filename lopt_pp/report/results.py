"""What a run has come to, in figures: for tables, tiles and files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lopt_pp.report.run_data import RunData

_LAST = 1 / 20
"""The share of the steps over which the training loss at the end is a mean: single steps differ by their rows."""


@dataclass(frozen=True)
class HeldOut:
    """The task loss on a set of held-out rows.

    Attributes:
        first: that was measured.
        first_step: steps done then.
        lowest: of all.
        lowest_step: likewise.
        saved: of the model that is saved, if the run ends where it is.
        saved_step: likewise.
    """

    first: float
    first_step: int
    lowest: float
    lowest_step: int
    saved: float
    saved_step: int


@dataclass(frozen=True)
class Results:
    """Of a run.

    Attributes:
        steps: that it has made.
        seconds: in them.
        tokens: real ones, of all steps.
        tokens_per_second: without the first steps.
        loss: of the last steps, on the training rows; None where there is none.
        lowest_loss: of a step.
        held_out: by the name of the set of rows, which is empty where there is one.
        computing_share: of its time, of the stage that computes most.
        peak_memory_bytes: the most that a process has held.
    """

    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    loss: float | None
    lowest_loss: float | None
    held_out: Mapping[str, HeldOut]
    computing_share: float
    peak_memory_bytes: int


def results(run: RunData) -> Results:
    """What a run has come to so far."""
    losses = run.curve(len(run.stages) - 1, "loss")[1]
    few = max(1, int(len(losses) * _LAST))
    found = {rows: held_out(run, name) for rows, name in run.held_out.items()}
    return Results(
        steps=run.steps,
        seconds=run.seconds,
        tokens=sum(record["num_tokens"] for record in run.stages[-1]),
        tokens_per_second=run.tokens_per_second,
        loss=sum(losses[-few:]) / few if losses else None,
        lowest_loss=min(losses, default=None),
        held_out={rows: measured for rows, measured in found.items() if measured is not None},
        computing_share=max(run.times(stage).computing_share for stage in range(len(run.stages))),
        peak_memory_bytes=max(record.get("peak_memory_bytes", 0) for records in run.stages for record in records),
    )


def held_out_points(run: RunData, name: str) -> list[tuple[float, int]]:
    """(loss, steps done) of each measurement of a task loss on held-out rows; infinite where it is not a number."""
    steps, losses = run.curve(len(run.stages) - 1, name)
    return [(math.inf if math.isnan(loss) else loss, int(step)) for step, loss in zip(steps, losses, strict=True)]


def held_out(run: RunData, name: str) -> HeldOut | None:
    """The task loss of that name on held-out rows; None where it was not measured."""
    if not (points := held_out_points(run, name)):
        return None
    saved = saved_step(run)
    by_step = {step: (loss, step) for loss, step in points}
    return HeldOut(*points[0], *min(points), *by_step.get(points[-1][1] if saved is None else saved, points[-1]))


def saved_step(run: RunData) -> int | None:
    """After how many steps the model was that is saved, if the run ends where it is; None for the last one.

    As `lopt_pp.checkpoint.best` chooses it: among the checkpoints and the last step.
    """
    if not run.flags.get("load_best_model_at_end") or not run.held_out:
        return None
    given = run.flags.get("metric_for_best_model") or next(iter(run.held_out.values()))
    name = given if given.startswith("eval_") else f"eval_{given}"
    greater = run.flags.get("greater_is_better")
    if greater is None:
        greater = not name.endswith(("loss", "perplexity"))
    steps, values = run.curve(len(run.stages) - 1, name)
    points = [
        (math.inf if math.isnan(value) else -value if greater else value, int(step))
        for step, value in zip(steps, values, strict=True)
    ]
    candidates = [point for point in points if _may_be_saved(run, point[1])] + points[-1:]
    return min(candidates)[1] if candidates else None


def _may_be_saved(run: RunData, step: int) -> bool:
    """Whether there was a checkpoint after a step that was evaluated, by the flags."""
    strategy = run.flags.get("save_strategy", "steps")
    if strategy == "best":
        return step > 0
    if strategy == "epoch":
        epochs = dict(zip(*run.curve(len(run.stages) - 1, "epoch"), strict=True))
        return step > 0 and float(epochs.get(step, step)).is_integer()
    return step > 0 and step % (run.flags.get("save_steps") or 1) == 0


def best_of(all_results: Sequence[Results]) -> tuple[int, str | None] | None:
    """Which of several runs ends best.

    Returns:
        Its number, and the set of held-out rows that says so: that which most runs have; None where it is the training
        loss, since no run has held-out rows. None where no run has a loss.
    """
    sets = [rows for one in all_results for rows in one.held_out]
    if sets:
        rows = min(set(sets), key=lambda name: (-sets.count(name), name))
        losses = [one.held_out[rows].saved if rows in one.held_out else math.inf for one in all_results]
        return losses.index(min(losses)), rows
    training = [math.inf if one.loss is None or math.isnan(one.loss) else one.loss for one in all_results]
    return (training.index(min(training)), None) if min(training) < math.inf else None

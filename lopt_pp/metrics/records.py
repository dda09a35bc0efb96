"""Where a stage's time goes, step by step, and how much memory its process needs."""

from collections.abc import Mapping
from typing import Any

PHASES = ("wait_receive", "forward", "backward", "optimizer", "wait_send", "schedule", "probe", "eval")
"""What a stage does in a step: waits for hidden states, runs its block and its loss forward, runs backward, steps its
optimizer, waits until it may send, and now and then measures its boundary's drift or runs held-out rows. End to end
across processes, PyTorch's schedule does all but the optimizer, waits included. What is left of a step's wall time goes
to data and bookkeeping."""

COMPUTE_PHASES = ("forward", "backward", "optimizer")


Record = dict[str, Any]
"""What a stage reports of a step, by name: numbers, and its `intervals`."""

Interval = tuple[str, float, float]
"""A phase, with the seconds at which it began and ended."""


def is_measured(name: str) -> bool:
    """Whether a value of that name in a record was measured on the held-out rows."""
    return name.startswith("eval_") and not name.endswith("_seconds")


def time_shares(record: Mapping[str, float]) -> dict[str, float]:
    """The shares of wall time that a stage spent computing and waiting, by name.

    Args:
        record: `*_seconds` by name, of a step or summed over several.
    """
    wall = record["step_seconds"]
    evaluating = {"evaluating": seconds / wall} if (seconds := record.get("eval_seconds", 0.0)) else {}
    if schedule := record.get("schedule_seconds", 0.0):
        own = {"in the 1F1B schedule": schedule / wall, "optimizer": record["optimizer_seconds"] / wall}
        return own | evaluating
    return {
        "computing": sum(record[f"{phase}_seconds"] for phase in COMPUTE_PHASES) / wall,
        "waiting to receive": record["wait_receive_seconds"] / wall,
        "waiting to send": record["wait_send_seconds"] / wall,
    } | evaluating


FILE = "run.json"

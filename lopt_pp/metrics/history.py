"""What a run has logged, as `transformers` keeps it in `state.log_history`: made of `metrics.jsonl`."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from lopt_pp.metrics.jsonl import records_until
from lopt_pp.metrics.logs import Window, evaluation_logs, logs_after, training_logs
from lopt_pp.metrics.records import Record


def read_records(path: Path, num_steps: int) -> list[Record]:
    """The records of a run's steps, those before it was resumed included.

    Args:
        path: of `metrics.jsonl`; where it is missing, as on a machine that does not share it, there are none.
        num_steps: that have been done.
    """
    return [json.loads(line) for line in records_until(path, num_steps)]


def log_history(
    records: Sequence[Record], num_steps: int, logging_steps: int, logging_first_step: bool = False
) -> list[dict[str, float]]:
    """The logs of a run from its first step on.

    Args:
        records: of `read_records`.
        num_steps: that have been done.
        logging_steps: steps between logs of the training; 0 for none.
        logging_first_step: whether there are logs of the first as well.

    Returns:
        In order, what callbacks are given as `logs`, with the `step` after which it was.
    """
    window, logs, num_tokens = Window(), list[dict[str, float]](), 0
    for step, own in itertools.groupby(records, lambda record: record["step"]):
        of_step = sorted(own, key=lambda record: record["stage"])
        if step > 0:
            window.add(of_step)
            num_tokens += of_step[-1]["num_tokens"]
            if logs_after(step, logging_steps, logging_first_step, num_steps):
                logs.append(training_logs(window.take(), num_tokens) | {"step": step})
        if metrics := evaluation_logs(of_step):
            logs.append(metrics | {"step": step})
    return logs


def steps_per_epoch(records: Sequence[Record]) -> int:
    """The steps of a run that make an epoch, as its records have it; 1 where they do not say."""
    last = records[-1] if records else {}
    return round(last["step"] / last["epoch"]) if last.get("epoch") else 1


def mean_loss(records: Sequence[Record], steps_before: int) -> float:
    """The mean loss of the last stage over all steps after some that have one; as in `transformers` 0.0 without any."""
    last = max((record["stage"] for record in records), default=0)
    own = (record for record in records if record["stage"] == last and record["step"] > steps_before)
    losses = [record["loss"] for record in own if "loss" in record]  # A step without a target token has none.
    return sum(losses) / len(losses) if losses else 0.0

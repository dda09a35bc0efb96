"""What logs say of the steps since the last ones: of the last stage under the names that transformers has, and of all.

The names are those of `transformers.Trainer`: `loss`, `grad_norm`, `learning_rate`, `eval_loss`, `epoch`. They are of
the last stage, which has the task's loss. What a stage reports besides is there as `NAME/stage INDEX`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lopt_pp.config.evaluation import TOKEN_METRICS
from lopt_pp.metrics.records import Record, is_measured, time_shares

_OF_THE_RUN = ("loss", "grad_norm", "learning_rate", *TOKEN_METRICS)
"""Of the last stage, also without its number."""


class Window:
    """The steps since the last logs.

    Losses and what is measured of single tokens are their means, as in transformers and TRL; seconds are added up, and
    tokens a second are those of all of them. The rest is of the last step.
    """

    def __init__(self) -> None:
        self._stages: list[_Sums] = []

    def add(self, records: Sequence[Record]) -> None:
        """Takes a step's records, one of each stage; not of step 0, in which nothing is trained."""
        self._stages = self._stages or [_Sums() for _ in records]
        for own, record in zip(self._stages, records, strict=True):
            own.add(record)

    def __bool__(self) -> bool:
        return bool(self._stages)

    def take(self) -> list[Record]:
        """One record of each stage for all the steps; the next steps begin a new window."""
        taken, self._stages = self._stages, []
        return [own.joined() for own in taken]


class _Sums:
    """Of one stage: no step is kept, since a run may have no logs at all."""

    def __init__(self) -> None:
        self._steps = 0
        self._last: Record = {}
        self._sums: Counter[str] = Counter()
        self._means: dict[str, tuple[float, int]] = {}

    def add(self, record: Record) -> None:
        self._steps += 1
        self._last = record
        for name, value in record.items():
            if (name.endswith("loss") or name in TOKEN_METRICS) and not is_measured(name):
                total, number = self._means.get(name, (0.0, 0))
                self._means[name] = total + value, number + 1
            elif name.endswith("_seconds") or name == "num_tokens":
                self._sums[name] += value

    def joined(self) -> Record:
        joined = {name: value for name, value in self._last.items() if not is_measured(name)}
        joined |= {name: total / number for name, (total, number) in self._means.items()}
        speed = self._sums["num_tokens"] / self._sums["step_seconds"]
        return joined | self._sums | {"tokens_per_second": speed, "steps": self._steps}


def training_logs(records: Sequence[Record], num_tokens: float) -> dict[str, float]:
    """What trackers and callbacks are given of some steps.

    Args:
        records: of each stage, as `Window.take` gives them.
        num_tokens: that the run has trained on so far; TRL has the number by that name.

    Returns:
        Numbers by name. Times are shares of the wall time, and the seconds of a step.
    """
    last = records[-1]
    values = {name: float(last[name]) for name in _OF_THE_RUN if name in last}
    for record in records:
        own = {
            name: value
            for name, value in record.items()
            if not name.endswith("_seconds") and name not in ("step", "stage", "epoch", "steps", "num_targets")
        }
        own |= {f"share {what}": share for what, share in time_shares(record).items()}
        own["step_seconds"] = record["step_seconds"] / record["steps"]
        values |= {f"{name}/stage {record['stage']}": float(value) for name, value in own.items()}
    return values | {"num_tokens": float(num_tokens)} | _epoch(last)


def evaluation_logs(records: Sequence[Record]) -> dict[str, float]:
    """What was measured on held-out rows after a step; empty where nothing was.

    Args:
        records: of each stage.

    Returns:
        Numbers by name: those of the last stage as they are (`eval_loss`), those of the others with their stage.
    """
    *others, last = records
    values = {name: float(last[name]) for name in last if is_measured(name)}
    for record in others:
        values |= {f"{name}/stage {record['stage']}": float(record[name]) for name in record if is_measured(name)}
    if values:
        values["eval_runtime"] = max(record.get("eval_seconds", 0.0) for record in records)
        values |= _epoch(last)
    return values


def _epoch(record: Mapping[str, Any]) -> dict[str, float]:
    return {"epoch": float(record["epoch"])} if "epoch" in record else {}


def logs_after(step: int, logging_steps: int, logging_first_step: bool, num_steps: int) -> bool:
    """Whether there are logs after a step, for the screen and for trackers: every so many, and after the last.

    Args:
        step: that is done.
        logging_steps: steps between logs; 0 for none.
        logging_first_step: whether the first has some, too.
        num_steps: of the run.
    """
    if logging_steps == 0:
        return step == 1 and logging_first_step
    return step % logging_steps == 0 or step == num_steps or (step == 1 and logging_first_step)

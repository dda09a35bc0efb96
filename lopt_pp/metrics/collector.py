"""Brings the records of all stages together: one file, one progress bar, one summary.

Every stage puts its records into the run's key-value store and goes on; a thread of rank 0 takes them out. Nothing here
is on the training path.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import Store

from lopt_pp.config.evaluation import TOKEN_METRICS, eval_prefix
from lopt_pp.errors import first_line
from lopt_pp.evaluation.scores import perplexity
from lopt_pp.metrics.evaluations import Evaluations
from lopt_pp.metrics.jsonl import MetricsFile
from lopt_pp.metrics.listeners import Listener
from lopt_pp.metrics.progress import Progress
from lopt_pp.metrics.records import Record, is_measured, time_shares
from lopt_pp.metrics.trace import QueueLengths
from lopt_pp.util.screen import SCREEN
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)


EVALUATED = "/evaluated"
"""Ends the key of a record of which a part was posted before the evaluation."""

IS_PART = "is_part"
"""In a part of a record that is posted before the step's evaluation: the whole record follows."""


def post(store: Store, replica: int, record: Record, clock_offset: float = 0.0, part: str = "") -> None:
    """Puts a stage's record of a step where rank 0 finds it.

    Args:
        store: of the run.
        replica: that reports.
        record: of the step.
        clock_offset: seconds to add to this process's clock to get rank 0's.
        part: `EVALUATED` where a part of it has been posted.
    """
    intervals = [
        (phase, *(round(moment + clock_offset, 6) for moment in ends)) for phase, *ends in record.get("intervals", ())
    ]
    key = f"record/{record['stage']}/{record['step']}/{replica}{part}"
    store.set(key, json.dumps(record | {"intervals": intervals}))


def post_end(store: Store, step: int) -> None:
    """Tells the collector that the run has ended early, after `step` steps."""
    store.set(f"record/0/{step + 1}/0", json.dumps(None))


class Collector:
    """Takes the records of all stages, in a thread of rank 0.

    Writes one record per step and stage to `metrics.jsonl`, moves the progress bar (on a terminal), logs what
    `logs_after` says, and tells the listeners.

    Args:
        store: a connection to the run's store for this thread alone, with a long timeout.
        path: of `metrics.jsonl`.
        loss_names: of each stage, in order; None for one without a loss.
        num_steps: of the run.
        logs_after: whether there is a log line after a step.
        num_replicas: that report each stage.
        steps_done: before this run; their records stay in the file.
        listeners: that are told of each step, in this thread. One that fails is told of no more.
        from_start: whether there are records of step 0, an evaluation before the first.
        evaluations: keeps what is measured on held-out rows; by default, on one set without a name.
        saves_after: whether a checkpoint is due after a step.
        shows_bar: whether there is a progress bar where standard error is a terminal.
    """

    def __init__(
        self,
        store: Store,
        path: Path,
        loss_names: Sequence[str | None],
        num_steps: int,
        logs_after: Callable[[int], bool],
        num_replicas: int = 1,
        steps_done: int = 0,
        listeners: Sequence[Listener] = (),
        from_start: bool = False,
        evaluations: Evaluations | None = None,
        saves_after: Callable[[int], bool] = lambda step: False,
        shows_bar: bool = True,
    ) -> None:
        self._store = store
        self._path = path
        self._loss_names = loss_names
        self._num_steps = num_steps
        self._logs_after = logs_after
        self._progress = Progress(loss_names, num_steps, steps_done, saves_after)
        self._shows_bar = shows_bar
        self._num_replicas = num_replicas
        self._steps_done = steps_done
        self._first_step = 0 if from_start else steps_done + 1
        self._evaluations = evaluations or Evaluations(steps_done)
        self._listeners = list(listeners)
        self._queues = QueueLengths()
        self._begun = time.perf_counter()
        self._seconds: list[Counter[str]] = [Counter() for _ in loss_names]
        """By stage, the seconds of the whole run in each of the record's `*_seconds`."""
        self._thread = in_background(self._collect)

    def _collect(self) -> None:
        """Takes all records. Whoever waits for one is told where no more come."""
        try:
            self._take_and_tell()
        except dist.DistError:  # The store is gone, and the watchdog ends the process.
            raise
        except Exception:
            logger.exception("no more metrics are collected, because of an error. Training goes on without them")
        self._evaluations.end()

    def _take_and_tell(self) -> None:
        file = MetricsFile(self._path, self._steps_done)
        self._evaluations.remember(file.evaluations)
        with SCREEN.bar(self._progress.bar) if self._shows_bar else nullcontext(lambda: None) as draw:
            for step in range(self._first_step, self._num_steps + 1):
                replicas = self._take_all(step)
                if replicas is None:
                    break
                if is_evaluated := IS_PART in replicas[0][0]:
                    self._show(step, self._join(replicas))
                    draw()
                    replicas = self._take_all(step, EVALUATED) or []
                records = self._join(replicas)
                self._add_queue_lengths(records, replicas)
                file.write(records)
                self._tell(methodcaller("step", step, records, replicas))
                for seconds, record in zip(self._seconds, records, strict=True):
                    seconds.update({name: value for name, value in record.items() if name.endswith("_seconds")})
                if is_evaluated:
                    self._progress.speed.pause()
                else:
                    self._show(step, records)
                draw()
                self._keep(step, records[-1])

    def _show(self, step: int, records: Sequence[Record]) -> None:
        """Shows how a step went, and how far the run is."""
        self._progress.add(step, records)
        if step > 0 and self._logs_after(step):
            logger.info("step %d/%d: %s", step, self._num_steps, self._progress.line())

    def _keep(self, step: int, record: dict[str, Any]) -> None:
        """Keeps the last stage's evaluation of a step, where there was one, and says that the step is collected."""
        for line in self._evaluations.add(step, record):
            logger.info("step %d/%d: %s", step, self._num_steps, line)

    def measured(self, step: int) -> Mapping[str, float]:
        """What was measured on held-out rows after a step, by name; see `Evaluations.after`."""
        return self._evaluations.after(step)

    def eval_loss(self, step: int) -> float | None:
        """The mean loss on the only set of held-out rows after a step; None where it was not measured, or not finite.

        Waits for the records of the step. May be called from any thread.
        """
        return self.measured(step).get("eval_loss")

    def _add_queue_lengths(self, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        for stage, (record, *pair) in enumerate(zip(records, replicas, replicas[1:], strict=False)):
            lengths = [
                length
                for replica, (sending, receiving) in enumerate(zip(*pair, strict=True))
                if (length := self._queues.mean(stage, replica, sending["intervals"], receiving["intervals"]))
                is not None
            ]
            if lengths:
                record["queue_length"] = sum(lengths) / len(lengths)

    def _tell(self, what: Callable[[Listener], None]) -> None:
        for listener in list(self._listeners):
            try:
                what(listener)
            except Exception as error:  # Whatever a tracker's library raises: training is not to end of it.
                logger.warning("%s has failed: %s. Training goes on without it", listener.name, first_line(error))
                self._listeners.remove(listener)

    def _join(self, replicas: Sequence[Sequence[Record]]) -> list[Record]:
        """The record of each stage, from those of its replicas."""
        return [join_replicas(own, self._evaluations.set_names) for own in replicas]

    def _take_all(self, step: int, part: str = "") -> list[list[Record]] | None:
        """The records of a step by stage, of each replica; None where the run has ended before it."""
        first = self._take(0, step, part)
        if first is None:
            return None
        return [first, *(self._take(stage, step, part) or [] for stage in range(1, len(self._loss_names)))]

    def _take(self, stage: int, step: int, part: str) -> list[Record] | None:
        """The records of a stage's replicas of a step; None where the run has ended before it."""
        records = []
        for replica in range(self._num_replicas):
            key = f"record/{stage}/{step}/{replica}{part}"
            record = json.loads(self._store.get(key))
            if record is None:
                return None
            records.append(record)
            self._store.delete_key(key)
        return records

    def saved(self, step: int) -> None:
        """Tells the listeners of a checkpoint. May be called from any thread."""
        self._tell(methodcaller("saved", step))

    def join(self) -> None:
        """Waits for the last record of the last stage, and for the listeners."""
        self._thread.join()
        self._tell(methodcaller("end"))

    def summary(self) -> list[dict[str, float]]:
        """By stage: the share of the run's wall time (from the first step) spent computing, receiving and sending.

        Nothing where no step was made: a run may have had only its model to save.
        """
        return [time_shares(seconds) for seconds in self._seconds if seconds]

    @property
    def seconds(self) -> float:
        """Since the collector began."""
        return time.perf_counter() - self._begun


def join_replicas(records: Sequence[Record], set_names: Sequence[str] = ("",)) -> dict[str, Any]:
    """One record of a stage's step from those of its replicas.

    Losses, and what is measured on held-out rows, are shares of one mean, or of the first replica alone; and tokens are
    each replica's own: they add up. Seconds and utilization are their
    mean, memory is the most; the rest is the same for all. Intervals are left out.

    Args:
        records: of the replicas.
        set_names: of the sets of held-out rows.
    """
    joined = {name: value for name, value in records[0].items() if name != "intervals"}
    for name in joined:
        values = [record[name] for record in records if name in record]
        if is_measured(name) or name.endswith("loss") or name in (*TOKEN_METRICS, "num_tokens", "num_targets"):
            joined[name] = sum(values)
        elif name.endswith("_seconds") or name == "mfu":
            joined[name] = sum(values) / len(values)
        elif name == "peak_memory_bytes":
            joined[name] = max(values)
    for prefix in map(eval_prefix, set_names):
        if f"{prefix}loss" in joined:
            joined[f"{prefix}perplexity"] = perplexity(joined[f"{prefix}loss"])
    return joined | {"tokens_per_second": joined["num_tokens"] / joined["step_seconds"]}

"""What the intervals of all stages, on one clock, tell: how full the queues are, and a trace of the whole pipeline."""

import json
import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lopt_pp.metrics.records import Interval, Record
from lopt_pp.util.files import write_text

logger = logging.getLogger(__name__)

NAMES = {
    "wait_receive": "receive",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "wait_send": "send",
    "schedule": "1F1B schedule",
    "probe": "probe",
    "eval": "evaluate",
}
"""What each phase is called in a trace."""

_COLOURS = {
    "wait_receive": "grey",
    "forward": "good",
    "backward": "thread_state_runnable",
    "optimizer": "bad",
    "wait_send": "generic_work",
    "schedule": "good",
    "probe": "yellow",
    "eval": "olive",
}
"""Names of colours that trace viewers know; those that do not choose for themselves."""


class QueueLengths:
    """Counts the microbatches that wait at each boundary."""

    def __init__(self) -> None:
        self._handed_on: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._taken: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._takings: defaultdict[tuple[int, int], deque[float]] = defaultdict(deque)
        """Moments at which the next stage took a message, of those that are still to be counted."""

    def mean(
        self, stage: int, replica: int, sending: Sequence[Interval], receiving: Sequence[Interval]
    ) -> float | None:
        """How many messages waited after a stage when it had the next one ready, on the mean of a step.

        Those count that the stage has handed on and the next stage has not taken yet: on their way, or arrived. Asked
        for every step in order.

        Args:
            stage: that sends.
            replica: of the pipeline.
            sending: the stage's intervals of the step.
            receiving: those of the next stage of the same step.

        Returns:
            The mean; None where the stage has sent nothing.
        """
        boundary, lengths = (stage, replica), []
        takings = self._takings[boundary]
        takings.extend(end for phase, _, end in receiving if phase == "wait_receive")
        for phase, ready, _ in sending:
            if phase != "wait_send":
                continue
            # Nothing is taken before it is handed on, whatever clocks of two machines say.
            while takings and takings[0] <= ready and self._taken[boundary] < self._handed_on[boundary]:
                takings.popleft()
                self._taken[boundary] += 1
            lengths.append(self._handed_on[boundary] - self._taken[boundary])
            self._handed_on[boundary] += 1
        return sum(lengths) / len(lengths) if lengths else None


class TraceFile:
    """Writes `trace.json`, in the trace event format that Perfetto and chrome://tracing read.

    One process of the trace is a replica of the pipeline, one row a stage; arrows join what a stage sends to where the
    next one receives it.

    Args:
        path: of the file.
        window: the steps to trace, counted from 1.
        row_names: of each stage.
        about: what else the file says of the run.
    """

    name = "the trace"

    def __init__(self, path: Path, window: range, row_names: Sequence[str], about: dict[str, Any]) -> None:
        self._path = path
        self._window = window
        self._row_names = row_names
        self._about = about
        self._parts: list[tuple[int, int, int, Sequence[Interval]]] = []

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        if step in self._window:
            for stage, own in enumerate(replicas):
                for replica, record in enumerate(own):
                    self._parts.append((step, stage, replica, record.get("intervals", ())))
        if step == self._window[-1]:
            self.end()

    def saved(self, step: int) -> None:
        """Checkpoints are written beside the steps, and have no place in the trace."""

    def end(self) -> None:
        """Writes what there is."""
        if not self._parts:
            return
        events = list(trace_events(self._parts, self._row_names))
        self._parts = []
        content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": self._about}
        write_text(self._path, json.dumps(content))
        logger.info("the trace is in %s", self._path)


def trace_events(
    parts: Sequence[tuple[int, int, int, Sequence[Interval]]], row_names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The events of a trace.

    Args:
        parts: (step, stage, replica, intervals), on one clock.
        row_names: of each stage.
    """
    # A process for each replica, a thread for each stage; arrows join a message's end of sending and of receiving.
    origin = min((begin for *_, intervals in parts for _, begin, _ in intervals), default=0.0)
    for replica in sorted({replica for _, _, replica, _ in parts}):
        yield _name("process_name", replica, 0, f"replica {replica}" if replica else "pipeline")
        for stage, name in enumerate(row_names):
            yield _name("thread_name", replica, stage, name)
            yield {
                "ph": "M",
                "name": "thread_sort_index",
                "pid": replica,
                "tid": stage,
                "args": {"sort_index": stage},
            }
    for step, stage, replica, intervals in parts:
        place = {"pid": replica, "tid": stage}
        received = sent = 0
        for phase, begin, end in intervals:
            received += phase == "wait_receive"
            sent += phase == "wait_send"
            number = sent if phase == "wait_send" else received
            microbatch = {"microbatch": number} if phase not in ("optimizer", "probe", "schedule") else {}
            yield {
                "ph": "X",
                "cat": phase,
                "name": NAMES[phase],
                "ts": _microseconds(begin - origin),
                "dur": _microseconds(end - begin),
                "cname": _COLOURS[phase],
                "args": {"step": step, **microbatch},
                **place,
            }
            arrow = {"cat": "boundary", "name": "hidden states", "ts": _microseconds((begin + end) / 2 - origin)}
            if phase == "wait_send":
                yield {"ph": "s", "id": f"{replica}/{stage}/{step}/{sent}", **arrow, **place}
            elif phase == "wait_receive" and stage > 0:
                yield {"ph": "f", "bp": "e", "id": f"{replica}/{stage - 1}/{step}/{received}", **arrow, **place}


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}

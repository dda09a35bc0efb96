"""Where a stage's time goes, step by step, and how much memory its process needs."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

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


class StageClock:
    """Times each phase of a stage's steps.

    On a GPU the phases are timed by CUDA events on the current stream, so that timing never waits for the device; they
    are read when the step is over. One event whose moment on the wall is known joins them to the host's clock, to some
    tens of microseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._intervals: list[Interval] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begin_step()

    def _begin_step(self) -> None:
        if self._on_gpu:
            self._anchor = torch.cuda.Event(enable_timing=True)
            self._anchor.record()
            self._anchor.synchronize()
        self._intervals, self._events, self._begun = [], [], time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._intervals.append((phase, start, time.perf_counter()))
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((phase, first, last))

    def read(self) -> Record:
        """Of the time since the last call: the seconds of each phase and of all on the wall, and every interval.

        Returns:
            `*_seconds` by name, and `intervals`, in seconds of `time.perf_counter`.
        """
        if self._events:
            self._events[-1][2].synchronize()
        for phase, *ends in self._events:
            begin, end = (self._begun + self._anchor.elapsed_time(event) / 1000 for event in ends)
            self._intervals.append((phase, begin, end))
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self._intervals:
            seconds[phase] += end - begin
        record: Record = {f"{phase}_seconds": value for phase, value in seconds.items()}
        record["intervals"], begun = self._intervals, self._begun
        self._begin_step()
        record["step_seconds"] = self._begun - begun
        return record


def is_measured(name: str) -> bool:
    """Whether a value of that name in a record was measured on the held-out rows."""
    return name.startswith("eval_") and not name.endswith("_seconds")


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats; infinite where float64 ends."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else loss * math.inf


def shares(record: Mapping[str, float]) -> dict[str, float]:
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


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held so far, in bytes: allocated on its GPU, or resident on a CPU.

    On Linux the resident peak is the kernel's `VmHWM`: `getrusage` would count what the process that started this one
    held before.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

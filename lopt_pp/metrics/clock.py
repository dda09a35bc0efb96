"""Times the phases of a stage's steps."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lopt_pp.metrics.records import PHASES, Interval, Record


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

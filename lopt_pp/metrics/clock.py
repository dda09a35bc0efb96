"""Times the phases of a stage's steps."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from lopt_pp.metrics.records import PHASES, Interval, Record


class StepTimes(Protocol):
    """The times of a step that is over, which may be known only later."""

    def is_known(self) -> bool:
        """Whether `record` answers without waiting for the device. Never waits itself."""

    def record(self) -> Record:
        """The seconds of each phase and of the whole step on the wall, and every interval.

        Of a clock's steps, asked for in their order, each once.

        Returns:
            `*_seconds` by name, and `intervals`, in seconds of `time.perf_counter`.
        """


class StageClock:
    """Times each phase of a stage's steps.

    On a GPU the phases are timed by CUDA events on the current stream, and nothing waits for the device: the times of a
    step are read once its events have come, which is mostly while the next one runs. Events whose moments on the host's
    clock have bounds join the two clocks, to some hundreds of microseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._intervals: list[Interval] = []
        self._events: list[_Timed] = []
        self._begun = time.perf_counter()
        if self._on_gpu:
            self._device_clock = _DeviceClock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._intervals.append((phase, start, time.perf_counter()))
            return
        first = _Mark()
        yield
        self._events.append((phase, first, _Mark()))

    def end_step(self) -> StepTimes:
        """Ends the step and begins the next one.

        Returns:
            The times since the last call.
        """
        if self._on_gpu:
            events, self._events = self._events, []
            return _DeviceTimes(self._device_clock, events, _Mark())
        begun, self._begun = self._begun, time.perf_counter()
        intervals, self._intervals = self._intervals, []
        return _HostTimes(intervals, self._begun - begun)


@dataclass(frozen=True)
class _HostTimes:
    """Times by the host's clock."""

    intervals: list[Interval]
    seconds: float

    def is_known(self) -> bool:
        return True

    def record(self) -> Record:
        seconds = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self.intervals:
            seconds[phase] += end - begin
        record: Record = {f"{phase}_seconds": value for phase, value in seconds.items()}
        return record | {"intervals": self.intervals, "step_seconds": self.seconds}


class _Mark:
    """A moment on the device that has not come yet, and the moment on the host when it was asked for."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.asked = time.perf_counter()
        self.event.record()


_Timed = tuple[str, _Mark, _Mark]


class _DeviceClock:
    """Puts moments of the device on the host's clock, from step to step.

    An event comes no sooner than it was asked for, and no later than it was seen to have come. That bounds how far the
    two clocks can drift apart, with no wait but the first, before any work.
    """

    def __init__(self) -> None:
        self._anchor = _Mark().event
        self._anchor.synchronize()
        self.moment = time.perf_counter()

    def moments(self, marks: Sequence[_Mark], seen: float) -> list[float]:
        """The moments of marks that have come, the last of them the latest; it is the anchor of the next ones.

        Args:
            marks: in the order in which they were recorded.
            seen: when the last of them was seen to have come.
        """
        moments = [self.moment + self._anchor.elapsed_time(mark.event) / 1000 for mark in marks]
        shift = max(mark.asked - moment for mark, moment in zip(marks, moments, strict=True))
        if shift < 0:
            shift = min(0.0, seen - moments[-1])
        moments = [moment + shift for moment in moments]
        self._anchor, self.moment = marks[-1].event, moments[-1]
        return moments


class _DeviceTimes:
    """The times of a step by events, once they have come.

    Args:
        clock: of the stage's steps.
        events: of each phase.
        last: after all of them.
    """

    def __init__(self, clock: _DeviceClock, events: list[_Timed], last: _Mark) -> None:
        self._clock, self._events, self._last = clock, events, last

    def is_known(self) -> bool:
        return self._last.event.query()

    def record(self) -> Record:
        if not self.is_known():
            self._last.event.synchronize()
        begun, seen = self._clock.moment, time.perf_counter()
        marks = [mark for _, *ends in self._events for mark in ends]
        moments = self._clock.moments([*marks, self._last], seen)
        ends = zip(moments[0:-1:2], moments[1:-1:2], strict=True)
        intervals = [(phase, *pair) for (phase, *_), pair in zip(self._events, ends, strict=True)]
        return _HostTimes(intervals, moments[-1] - begun).record()


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

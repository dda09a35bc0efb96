"""Where a stage's time goes, step by step, and how much memory its process needs."""

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PHASES = ("wait_receive", "forward", "backward", "optimizer", "wait_send", "schedule", "eval")
"""What a stage does in a step: waits for hidden states, runs its block and its loss forward, runs backward, steps its
optimizer, waits until it may send. End to end across processes, PyTorch's schedule does all but the optimizer, waits
included. At some steps it runs held-out rows. What is left of a step's wall time goes to data and bookkeeping."""

COMPUTE_PHASES = ("forward", "backward", "optimizer")


Record = dict[str, float]
"""What a stage reports of a step, by name."""


class StageClock:
    """Adds up the seconds that a stage spends in each phase of a step.

    On a GPU the phases are timed by CUDA events on the current stream, so that timing never waits for the device; they
    are read when the step is over.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begun = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if not self._on_gpu:
            start = time.perf_counter()
            yield
            self._seconds[phase] += time.perf_counter() - start
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((phase, first, last))

    def read(self) -> dict[str, float]:
        """The seconds of each phase, and of the whole step on the wall, since the last call; `*_seconds` by name."""
        if self._events:
            self._events[-1][2].synchronize()
        for phase, first, last in self._events:
            self._seconds[phase] += first.elapsed_time(last) / 1000
        now = time.perf_counter()
        record = {f"{phase}_seconds": seconds for phase, seconds in self._seconds.items()}
        record["step_seconds"] = now - self._begun
        self._seconds, self._events, self._begun = dict.fromkeys(PHASES, 0.0), [], now
        return record


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats; infinite where float64 ends."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else loss * math.inf


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

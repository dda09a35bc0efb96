"""What processes measure between each other: latency, bandwidth, and whether a transfer runs beside the computation."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lopt_pp.pipeline.boundary import Boundary

MESSAGES = 8
"""Sent one after another, to measure bandwidth."""

_PINGS = 100
_LONGEST_COMPUTE = 10_000
"""Products, at most, that are to take as long as a transfer."""


@dataclass(frozen=True)
class Link:
    """A boundary as one of its ends has measured it.

    Attributes:
        latency: seconds that the smallest message takes one way.
        bandwidth: bytes a second.
        overlap: how much of a transfer or of a computation, whichever is shorter, the other hides: 0 where they take
            turns, 1 where they run side by side.
    """

    latency: float
    bandwidth: float
    overlap: float


def measure(boundary: Boundary, rank: int) -> Link:
    """Measures a boundary. Both of its processes must call this, and nothing else is to use it meanwhile.

    Args:
        boundary: of this process and a neighbour.
        rank: of this process.
    """
    link = _Exchange(boundary, rank)
    link.ping(10)  # The first messages open connections.
    latency = link.ping(_PINGS)
    link.compute(10)  # And the first products load their kernel.
    link.transfer(lambda: None)
    seconds = link.transfer(lambda: None)
    # A computation that takes about as long.
    alone = _seconds(boundary.device, lambda: link.compute(10)) / 10
    products = min(_LONGEST_COMPUTE, max(1, round(seconds / alone)))
    computing = _seconds(boundary.device, lambda: link.compute(products))
    both = link.transfer(lambda: link.compute(products))
    hidden = (seconds + computing - both) / min(seconds, computing)
    return Link(latency, link.bytes / seconds, max(0.0, min(1.0, hidden)))


class _Exchange:
    """Messages between the two processes of a boundary, on the group that carries hidden states.

    Args:
        boundary: the two.
        rank: of this process.
    """

    def __init__(self, boundary: Boundary, rank: int) -> None:
        on_gpu = boundary.device.type == "cuda"
        self._group, self._device = boundary.payload, boundary.device
        self._sends = rank == boundary.source
        self._peer = boundary.target if self._sends else boundary.source
        size = 2**24 if on_gpu else 2**22
        self._messages = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(MESSAGES)]
        self._mark = torch.zeros(1, device=self._device)
        self._factor = torch.zeros(2048 if on_gpu else 192, 2048 if on_gpu else 192, device=self._device)
        self.bytes = size * MESSAGES

    def compute(self, products: int) -> None:
        for _ in range(products):
            self._factor @ self._factor

    def ping(self, times: int) -> float:
        """Seconds that a small message takes, there and back again, halved."""

        def turns() -> None:
            for _ in range(times):
                self._pass_mark(forward=True)
                self._pass_mark(forward=False)

        return _seconds(self._device, turns) / (2 * times)

    def transfer(self, compute: Callable[[], None]) -> float:
        """Seconds until all messages have arrived, and `compute`, which begins with them, is done."""
        self._pass_mark(forward=True)

        def run() -> None:
            begin = dist.isend if self._sends else dist.irecv
            works = [begin(message, self._peer, self._group) for message in self._messages]
            compute()
            for work in works:
                _wait(work, self._device)
            self._pass_mark(forward=False)

        return _seconds(self._device, run)

    def _pass_mark(self, forward: bool) -> None:
        begin = dist.isend if self._sends == forward else dist.irecv
        _wait(begin(self._mark, self._peer, self._group), self._device)


def _wait(work: dist.Work | None, device: torch.device) -> None:
    """Until it is done, as the host sees it: NCCL's own wait holds up the current stream only."""
    assert work is not None
    work.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(device: torch.device, run: Callable[[], None]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun

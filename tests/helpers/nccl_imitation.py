"""NCCL as the stream sees it, on CPUs, with threads for ranks: what PyTorch's `ProcessGroupNCCL` does and gloo not.

- A message is a kernel of a CUDA stream that each pair of ranks has for itself. It starts when the stream of the
  computation has done what was asked of it before, and ends when the other side has met it.
- The n-th send of a pair meets its n-th receive; tags are ignored.
- `Work.wait` makes the current stream wait, and the host only if it is given a time, which is counted from when the
  message was posted and not from the call.
- The first message of a pair makes a communicator, which holds the host up until the other side makes it too.
- With `one_queue`, all streams of a device share one hardware queue (`CUDA_DEVICE_MAX_CONNECTIONS=1`): a stream that is
  to wait holds up all that is asked for later. With `eager`, all pairs of a rank share one CUDA stream, as they do
  where the process group is told its device (`device_id`).
"""

import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import nccl_texts
import pytest
import torch
import torch.distributed as dist
from gpu_imitation import Device, Stream


@dataclass
class _Meeting:
    """Of a send with a receive."""

    sent: threading.Event = field(default_factory=threading.Event)
    received: threading.Event = field(default_factory=threading.Event)
    tensor: torch.Tensor | None = None


@dataclass
class Network:
    """What joins the ranks.

    Attributes:
        eager: whether all pairs of a rank share one CUDA stream.
        clock: for NCCL's limits of time.
        refuses: what NCCL says when a communicator is to be made; nothing where it makes it.
        error: what it says of messages that have been posted; nothing while all is well.
        messages: for each pair, the tags of its sends.
    """

    eager: bool = False
    clock: Callable[[], float] = time.monotonic
    refuses: str = ""
    error: str = ""
    messages: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._communicators: dict[tuple[int, int], threading.Barrier] = {}
        self._meetings: dict[tuple[int, int, int], _Meeting] = {}
        self._mail: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = {}

    def make_communicator(self, pair: tuple[int, int]) -> None:
        """Waits for the other side, which must make it too."""
        if self.refuses:
            raise dist.DistBackendError(self.refuses)
        with self._lock:
            barrier = self._communicators.setdefault(pair, threading.Barrier(2))
        barrier.wait()

    def _meeting(self, source: int, target: int, number: int) -> _Meeting:
        with self._lock:
            return self._meetings.setdefault((source, target, number), _Meeting())

    def send(self, tensor: torch.Tensor, source: int, target: int, number: int) -> None:
        """Does a pair's send of that number, once the receive is there."""
        meeting = self._meeting(source, target, number)
        meeting.tensor = tensor.detach().clone()
        meeting.sent.set()
        meeting.received.wait()

    def receive(self, tensor: torch.Tensor, source: int, target: int, number: int) -> None:
        """Does a pair's receive of that number, once the send is there."""
        meeting = self._meeting(source, target, number)
        meeting.sent.wait()
        assert meeting.tensor is not None
        tensor.view(torch.uint8).copy_(meeting.tensor.view(torch.uint8))
        meeting.received.set()

    def mail(self, source: int, target: int, tag: int) -> "queue.Queue[torch.Tensor]":
        """Of gloo."""
        with self._lock:
            return self._mail.setdefault((source, target, tag), queue.Queue())


class Work:
    """A message of NCCL's that was posted.

    Attributes:
        waited_for: set once somebody waits for it.
    """

    def __init__(self, group: "NcclGroup", done: threading.Event) -> None:
        self._group, self._done = group, done
        self._posted = group.network.clock()
        self.waited_for = threading.Event()

    def is_completed(self) -> bool:
        self.waited_for.set()
        return self._done.is_set() or bool(self._error(self._group.timeout))

    def wait(self, timeout: timedelta | None = None) -> bool:
        device = self._group.device
        device.current_stream.wait(self._done)
        self.waited_for.set()
        while timeout is not None and not self._done.is_set() and not self._error(min(timeout, self._group.timeout)):
            time.sleep(0.001)
        if error := self._error(self._group.timeout if timeout is None else min(timeout, self._group.timeout)):
            raise dist.DistBackendError(error)
        return True

    def _error(self, limit: timedelta) -> str:
        age, seconds = self._group.network.clock() - self._posted, limit.total_seconds()
        if not self._done.is_set() and age > seconds:
            return nccl_texts.WATCHDOG.format(limit=seconds * 1e3, age=age * 1e3)
        return "" if self._done.is_set() else self._group.network.error


class NcclGroup:
    """A rank's end of a process group of NCCL's.

    Args:
        network: joins the ranks.
        rank: of this end.
        device: of the rank.
        timeout: the limit of its messages.
    """

    def __init__(self, network: Network, rank: int, device: Device, timeout: timedelta = timedelta(days=3650)) -> None:
        self.network, self.device, self.timeout = network, device, timeout
        self.rank = rank
        self._streams: dict[object, Stream] = {}
        self._numbers: dict[tuple[int, int], Iterator[int]] = defaultdict(itertools.count)

    def post(self, tensor: torch.Tensor, source: int, target: int, tag: int) -> Work:
        """Posts a send or a receive, by which end this is."""
        pair = source, target
        if self.rank == source:
            self.network.messages[pair].append(tag)
        if not self.network.eager and pair not in self._streams:
            self.network.make_communicator(pair)
        stream = self._streams.setdefault("all" if self.network.eager else pair, self.device.stream())
        stream.wait(self.device.current_stream.record())
        number, done = next(self._numbers[pair]), threading.Event()
        move = self.network.send if self.rank == source else self.network.receive

        def kernel() -> None:
            move(tensor, source, target, number)
            done.set()

        stream.kernel(kernel)
        return Work(self, done)


class NcclOptions:
    """In the place of `ProcessGroupNCCL`, of which a build for CPUs has none: its options only."""

    @dataclass
    class Options:
        is_high_priority_stream: bool = False
        config: SimpleNamespace = field(default_factory=SimpleNamespace)


class GlooGroup:
    """A rank's end of a process group of gloo's: it minds tags, and waits on the host."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network, self.rank = network, rank

    def post(self, tensor: torch.Tensor, source: int, target: int, tag: int) -> "_Mail":
        mail = self._network.mail(source, target, tag)
        if self.rank == source:
            mail.put(tensor.clone())
        return _Mail(mail, tensor, is_received=self.rank == target)


@dataclass
class _Mail:
    mail: "queue.Queue[torch.Tensor]"
    tensor: torch.Tensor
    is_received: bool

    def is_completed(self) -> bool:
        return False  # As gloo has it until `wait` has returned.

    def wait(self, timeout: timedelta) -> bool:
        if self.is_received:
            try:
                self.tensor.copy_(self.mail.get(timeout=timeout.total_seconds()))
            except queue.Empty:
                limit = timeout.total_seconds() * 1e3
                raise RuntimeError(nccl_texts.GLOO_TIMED_OUT.format(limit=limit)) from None
        return True


@pytest.fixture
def imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `torch.distributed` post what is of the imitated groups, which are of more ranks than this process is."""

    def isend(tensor: torch.Tensor, dst: int, group: Any, tag: int = 0) -> object:
        return group.post(tensor, group.rank, dst, tag)

    def irecv(tensor: torch.Tensor, src: int, group: Any, tag: int = 0) -> object:
        return group.post(tensor, src, group.rank, tag)

    monkeypatch.setattr(dist, "isend", isend)
    monkeypatch.setattr(dist, "irecv", irecv)

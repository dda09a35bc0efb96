"""Reads of weights beside the compute: on a GPU, and on CPUs with streams that only note what they are told."""

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from lopt_pp.util.side_stream import SideStream


class NotingStream:
    """Has the place in line of a stream: an event is what stands before it, with all that this waits for."""

    def __init__(self, device: object = None) -> None:
        self.line: list[str] = []

    def record_event(self) -> "NotingEvent":
        return NotingEvent(self.line)

    def wait_event(self, event: "NotingEvent") -> None:
        self.line += event.line


class NotingEvent:
    def __init__(self, line: list[str]) -> None:
        self.line = list(line)


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> NotingStream:
    """The stream that computes, where nothing else is the current one."""
    current = [NotingStream()]

    @contextlib.contextmanager
    def stream(side: NotingStream) -> Iterator[None]:
        current.append(side)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", NotingStream)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return current[0]


def test_a_read_waits_for_the_last_change_and_for_nothing_after_it(compute: NotingStream) -> None:
    side = SideStream(torch.device("cuda", 0))
    with side.changing():
        compute.line.append("step 1")
    compute.line.append("a message that never comes")
    with side.reading():
        own = torch.cuda.current_stream(side._device)
        assert isinstance(own, NotingStream) and own is not compute
        assert own.line == ["step 1"]
        own.line.append("copy")
    # The next change waits for the copy, and only once.
    with side.changing():
        assert compute.line == ["step 1", "a message that never comes", "step 1", "copy"]
    with side.changing():
        assert compute.line.count("copy") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_another_thread_reads_while_the_compute_stands() -> None:
    device = torch.device("cuda")
    side, weights, read = SideStream(device), torch.zeros(4, device=device), []
    with side.changing():
        weights.add_(1)
    torch.cuda._sleep(4_000_000_000)  # Cycles: seconds of the stream that computes.
    busy = torch.cuda.current_stream().record_event()

    def save() -> None:
        with side.reading():
            read.append(weights.cpu())

    thread = threading.Thread(target=save)
    thread.start()
    thread.join()
    assert not busy.query()
    assert read[0].tolist() == [1] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_change_waits_for_the_copy_and_the_host_does_not() -> None:
    device = torch.device("cuda")
    side, weights = SideStream(device), torch.zeros(1 << 26, device=device)
    side.changed()
    copy = torch.empty(weights.shape, pin_memory=True)
    with side.reading() as reading:
        torch.cuda._sleep(500_000_000)
        copy.copy_(weights, non_blocking=True)
    with side.changing():
        weights.add_(1)
    reading.wait()
    assert not copy.any() and bool(weights.all())

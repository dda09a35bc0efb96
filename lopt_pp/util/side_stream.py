"""Reads the weights of a GPU beside its compute: on a stream of its own, which waits for the weights alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Reading:
    """Copies that were begun, and may still be under way on the GPU."""

    def __init__(self) -> None:
        self._done: torch.cuda.Event | None = None

    def begun(self, done: torch.cuda.Event) -> None:
        self._done = done

    def wait(self) -> None:
        """Waits on the host until the copies are whole. Any thread may call it."""
        if self._done is not None:
            self._done.synchronize()


class SideStream:
    """Orders reads of tensors on one device with their changes, by events on the GPU; the host waits for neither.

    The stream that computes may stand behind a message that never comes. Whoever reads on that stream then waits for
    it too, though the weights have long been there; a read on this one waits only for the last change of them. On a CPU
    there are no streams, and nothing here does anything.

    Args:
        device: of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._changed: torch.cuda.Event | None = None
        self._read: torch.cuda.Event | None = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """For changes of the tensors on the current stream: they come after all reads that were begun before them."""
        if self._device.type == "cuda" and self._read is not None:
            torch.cuda.current_stream(self._device).wait_event(self._read)
            self._read = None
        yield
        self.changed()

    def changed(self) -> None:
        """Notes that the tensors are as the work on the current stream so far leaves them."""
        if self._device.type == "cuda":
            self._changed = torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """For copies of the tensors, from any thread: they come after the last change, whatever was begun since."""
        reading = Reading()
        if self._device.type != "cuda":
            yield reading
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        if self._changed is None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            self._stream.wait_event(self._changed)
        # A thread begins with the first GPU, and leaving the stream would take memory there.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield reading
        self._read = self._stream.record_event()
        reading.begun(self._read)

"""The stream of hidden states across a boundary: one way, non-blocking, bounded.

Per microbatch one tensor goes forward, and nothing comes back. A small header for each message travels `queue_depth`
messages ahead of it, over gloo; the payload goes over NCCL between GPUs and gloo between CPUs. So the receiver has
checked what is coming before it posts a buffer for it, and has up to `queue_depth` receives posted before they are
needed. A header that differs from what the receiver's own data order expects is an error that names both sides, instead
of a hang. Where the run is asked to stop, the end comes in place of the first header of the step that is not made, or
in place of the next held-out microbatch. Where the run finishes early, the first header of its last step says so; where
it is asked to evaluate or to save, that of the step after which it does.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Protocol

import torch

from lopt_pp.distributed.shutdown import NEVER_STOPS, RunLength, StopSignal
from lopt_pp.errors import StreamError
from lopt_pp.pipeline.boundary import Boundary
from lopt_pp.pipeline.messages import Header, HeaderQueue, dtype_code
from lopt_pp.pipeline.transfer import Transfer

_TAG_PAYLOAD, _TAG_HEADER = 0, 1
_NOTHING = -2
"""Comes before all steps, and the evaluation before the first."""


class Receiver(Protocol):
    """A stage's end of the boundary before it."""

    def receive(self) -> torch.Tensor:
        """The next microbatch's hidden states, `[sequences, tokens, hidden]`, as soon as they are there.

        They are the caller's until it asks for the next ones.
        """

    def close(self) -> None:
        """Checks that nothing more comes."""


class Sender(Protocol):
    """A stage's end of the boundary after it."""

    def send(self, hidden_states: torch.Tensor) -> None:
        """Hands on the next microbatch's hidden states; waits only while `queue_depth` others are on their way."""

    def close(self) -> None:
        """Waits until everything has left."""


class LocalStream:
    """The boundary between two stages of one process."""

    def __init__(self) -> None:
        self._queue: deque[torch.Tensor] = deque()

    def send(self, hidden_states: torch.Tensor) -> None:
        self._queue.append(hidden_states)

    def receive(self) -> torch.Tensor:
        return self._queue.popleft()

    def close(self) -> None:
        assert not self._queue, "a microbatch was sent that no stage received"


class StreamSender:
    """The sending end of a boundary between two processes.

    Args:
        boundary: the two processes.
        headers: of every message of the whole run, in order; None while the next one's shape is not known (see
            `HeaderQueue`).
        queue_depth: messages that may be on their way at once.
        stop_signal: says which steps are made.
        length: of the run, where it may finish early.
    """

    def __init__(
        self,
        boundary: Boundary,
        headers: Iterable[Header | None],
        queue_depth: int,
        stop_signal: StopSignal = NEVER_STOPS,
        length: RunLength | None = None,
    ) -> None:
        self._length = length
        self._boundary = boundary
        self._announced: deque[Header] = deque()
        self._headers = HeaderQueue(headers)
        self._depth = queue_depth
        self._stop_signal = stop_signal
        self._payloads: deque[tuple[Transfer, torch.Tensor, Header]] = deque()
        self._header_works: deque[tuple[Transfer, torch.Tensor]] = deque()
        self._announce()

    def _announce(self) -> None:
        """Sends headers as far ahead as the queue is deep, their shapes are known, and it is decided that what they
        are of is made."""
        while len(self._announced) < self._depth and (header := self._headers.peek()) is not None:
            if header.may_be_end and not self._stop_signal.is_decided(*header.place):
                return
            self._headers.take()
            if header.may_be_end and not self._stop_signal.runs(*header.place):
                header = Header.end(*header.place)
                self._headers.is_over = True
            elif header.microbatch == 0 and self._length is not None:
                is_end = self._length.is_early and self._length.is_last(header.step + 1)
                header = replace(header, finishes=int(is_end), besides=self._length.besides(header.step))
            self._send_header(header)

    def _send_header(self, header: Header) -> None:
        self._announced.append(header)
        packed = header.pack()
        work = self._boundary.send(packed, self._boundary.headers, _TAG_HEADER)
        self._header_works.append((work, packed))
        # A header is small and long since received by now; this only lets go of its tensor.
        if len(self._header_works) > 2 * self._depth:
            self._boundary.wait(self._header_works.popleft()[0], "sending a header", self._boundary.target, header)

    def send(self, hidden_states: torch.Tensor) -> None:
        self._announce()
        assert self._announced, "a message is sent whose shape is not known"
        header = self._announced.popleft()
        given = (*hidden_states.shape, dtype_code(hidden_states.dtype))
        if given != (*header.shape, header.dtype):
            raise StreamError(f"stage {self._boundary.stage} was to send {header} but has {given}")
        if len(self._payloads) == self._depth:
            self._wait_oldest()
        work = self._boundary.send(hidden_states, self._boundary.payload, _TAG_PAYLOAD)
        self._payloads.append((work, hidden_states, header))
        self._announce()

    def _wait_oldest(self) -> None:
        work, _, header = self._payloads.popleft()
        self._boundary.wait(work, "sending", self._boundary.target, header)

    def close(self) -> None:
        self._announce()
        assert self._headers.is_over, "the stream is closed before its end is known"
        end = self._announced[-1]
        while self._payloads:
            self._wait_oldest()
        while self._header_works:
            self._boundary.wait(self._header_works.popleft()[0], "sending a header", self._boundary.target, end)


class StreamReceiver:
    """The receiving end of a boundary between two processes; the stop signal of the stages behind it.

    Args:
        boundary: the two processes.
        headers: of every message of the whole run that this process expects, in order, from its own data order; None
            while it does not know the next one's shape (see `HeaderQueue`).
        queue_depth: the same as the sender's, which is how far headers run ahead.
        length: of the run; is told where the run finishes early, before any more of that step is expected.
    """

    def __init__(
        self,
        boundary: Boundary,
        headers: Iterable[Header | None],
        queue_depth: int,
        length: RunLength | None = None,
    ) -> None:
        self._length = length
        self._boundary = boundary
        self._expected = HeaderQueue(headers)
        self._depth = queue_depth
        self._header_works: deque[tuple[Transfer, torch.Tensor]] = deque()
        self._payloads: deque[tuple[Transfer, torch.Tensor, Header]] = deque()
        self._buffers = _Buffers(queue_depth + 1, boundary.device)
        # Twice as far ahead as they are read, so that a header never waits for the link's round trip.
        for _ in range(2 * queue_depth):
            self._post_header()
        self._known = (_NOTHING, 0)
        """What is made for sure, up to and with this place: headers have told."""
        self._end: Header | None = None
        self._unchecked: deque[Header] = deque()
        """Came before this end knew what to expect."""

    def is_decided(self, step: int, held_out: int = 0) -> bool:
        return self._end is not None or (step, held_out) <= self._known

    def runs(self, step: int, held_out: int = 0) -> bool:
        while not self.is_decided(step, held_out):
            self._post_next()
        return self._end is None or (step, held_out) < self._end.place

    def _post_header(self) -> None:
        packed = Header.buffer()
        work = self._boundary.receive(packed, self._boundary.headers, _TAG_HEADER)
        self._header_works.append((work, packed))

    def _post_next(self) -> None:
        """Checks the next header against what is expected, and posts the receive of its payload."""
        arrival, packed = self._header_works.popleft()
        self._boundary.wait(arrival, "receiving a header", self._boundary.source, self._expected.peek())
        header = Header.unpack(packed)
        if header.microbatch == 0 and self._length is not None:
            if header.finishes == 1:
                self._length.finish_after(header.step + 1)
            self._length.do_after(header.step, header.besides)
            header = replace(header, finishes=0, besides=0)  # No end knows it from its own data order.
        self._unchecked.append(header)
        self._check_known()
        if header.is_end:
            self._end = header
            return
        self._known = header.place
        self._post_header()
        buffer = self._buffers.take(header)
        work = self._boundary.receive(buffer, self._boundary.payload, _TAG_PAYLOAD)
        self._payloads.append((work, buffer, header))

    def _check_known(self) -> None:
        """Compares headers that have come with those that are expected, as far as this end knows what to expect."""
        while self._unchecked and self._expected.peek() is not None:
            expected, header = self._expected.take(), self._unchecked.popleft()
            stops_early = expected.may_be_end and header == Header.end(*expected.place)
            if header != expected and not stops_early:
                b = self._boundary
                raise StreamError(
                    f"stages {b.stage} and {b.stage + 1} disagree: stage {b.stage} (rank {b.source}) sends {header}, "
                    f"stage {b.stage + 1} (rank {b.target}) expects {expected}; both must be given the same data, "
                    f"model, flags and versions"
                )

    def receive(self) -> torch.Tensor:
        # Never waits for headers further ahead than this end knows what comes: the other end may not know it either.
        while (
            len(self._payloads) < self._depth
            and self._end is None
            and (not self._payloads or self._expected.peek() is not None)
        ):
            self._post_next()
        work, hidden_states, header = self._payloads.popleft()
        self._check_known()
        assert len(self._unchecked) <= len(self._payloads), "a message is received whose shape is not known"
        self._boundary.wait(work, "receiving", self._boundary.source, header)
        return hidden_states

    def close(self) -> None:
        while self._end is None:
            self._post_next()


class _Buffers:
    """Memory for messages, taken in turn: for those on their way, and the one that the stage works on.

    Args:
        number: of messages that are there at once.
        device: of the memory.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self._device = device
        self._ring = deque(torch.empty(0, dtype=torch.uint8, device=device) for _ in range(number))

    def take(self, header: Header) -> torch.Tensor:
        """The memory taken longest ago, as a tensor for the message; it grows where the message is the largest yet."""
        buffer, dtype = self._ring.popleft(), header.torch_dtype
        size = math.prod(header.shape) * dtype.itemsize
        if buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._ring.append(buffer)
        return buffer[:size].view(dtype).view(header.shape)

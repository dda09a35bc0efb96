"""Headers of every kind on a boundary: what the receiver expects, or an error before any memory is taken for it."""

import itertools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st

from lopt_pp.errors import StreamError
from lopt_pp.pipeline.boundary import Boundary
from lopt_pp.pipeline.messages import Header
from lopt_pp.pipeline.stream import StreamReceiver

EXPECTED = [
    Header(0, 0, 2, 3, 4),
    Header(0, 1, 2, 5, 4, 1),
    Header(0, 2, 1, 2, 4, 0, held_out=1),
    Header(0, 3, 1, 3, 4, 0, held_out=2),
    Header(1, 0, 1, 1, 4, 2),
]
RIGHT = [header.pack().tolist() for header in (*EXPECTED, Header.end(2))]
EARLY = {0: Header.end(0), 2: Header.end(0, 1), 3: Header.end(0, 2), 4: Header.end(1)}
"""By the place of a step's first message, or of a held-out one: what may come there if the run is stopped before it."""

INT64 = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([-(2**63), -1, 0, 1, 2, 2**31, 2**62, 2**63 - 1])
NINE = st.lists(INT64, min_size=9, max_size=9)


@st.composite
def streams(draw: st.DrawFn) -> list[list[int]]:
    """What a sender's headers may say, instead of what is expected."""
    sent = [list(numbers) for numbers in RIGHT]
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(sent) - 1))
        kind = draw(st.sampled_from(["number", "all", "swap", "repeat", "end"]))
        if kind == "number":
            sent[place][draw(st.integers(0, 7))] = draw(INT64)
        elif kind == "all":
            sent[place] = draw(NINE)
        elif kind == "end":
            sent[place] = Header.end(draw(st.integers(-1, 3)), draw(st.integers(0, 3))).pack().tolist()
        elif kind == "swap":
            sent[place], sent[0] = sent[0], sent[place]
        else:
            sent.insert(place, list(sent[place]))
    return sent


class Done:
    """A transfer that is over."""

    def wait(self, timeout: timedelta) -> bool:
        return True


class Gone:
    """A transfer from a neighbour that has left."""

    def wait(self, timeout: timedelta) -> bool:
        raise RuntimeError("connection closed by peer")


def receive(sent: list[list[int]], depth: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], str]:
    """The shapes that a receiver got, those that it took memory for, and what it said against the sender."""
    numbers = iter(sent)
    posted: list[tuple[int, ...]] = []

    def irecv(tensor: torch.Tensor, source: int, group: object, tag: int) -> Done | Gone:
        if tensor.dtype != torch.int64:
            posted.append(tuple(tensor.shape))
            return Done()
        if (header := next(numbers, None)) is None:
            return Gone()
        tensor.copy_(torch.tensor(header))
        return Done()

    boundary = Boundary(0, 1, 0, None, None, torch.device("cpu"), 1.0)  # type: ignore[arg-type]
    received = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "irecv", irecv)
        receiver = StreamReceiver(boundary, EXPECTED, depth)
        try:
            for _ in itertools.takewhile(lambda header: receiver.runs(*header.place), EXPECTED):
                received.append(tuple(receiver.receive().shape))
            receiver.close()
        except StreamError as error:
            return received, posted, str(error)
    return received, posted, ""


@given(streams(), st.integers(1, 5))
@example(RIGHT, 2)
@example([[0, 0, 2**62, 2**62, 2**62, 0, 0, 0, 0]], 1)
@example([[0, 0, -2, 3, 4, 0, 0, 0, 0]], 1)
@example([[0, 0, 2, 3, 4, 3, 0, 0, 0]], 1)
@example([[0, 0, 2, 3, 4, -1, 0, 0, 0]], 1)
@example([[0, 0, 2, 3, 4, 0, 0, 1, 0]], 1)
@example([[0, 0, 2, 3, 4, 0, 0, 0, 1]], 1)
@example([], 1)
def test_what_a_sender_announces(sent: list[list[int]], depth: int) -> None:
    received, posted, said = receive(sent, depth)
    agreed = next((n for n, pair in enumerate(zip(sent, RIGHT, strict=False)) if pair[0] != pair[1]), len(sent))
    shapes = [header.shape for header in EXPECTED]
    assert posted == shapes[:agreed], "memory for what was not agreed on"
    assert received == shapes[: len(received)]
    if agreed >= len(RIGHT):
        assert (received, said) == (shapes, "")
    elif agreed == len(sent):
        assert "has died or left" in said
    elif agreed in EARLY and Header(*sent[agreed]) == EARLY[agreed]:
        assert (received, said) == (shapes[:agreed], "")
    else:
        assert "disagree" in said and str(Header(*sent[agreed])) in said and str(Header(*RIGHT[agreed])) in said


@given(NINE)
@example([0, 0, 0, 0, 0, 2**63 - 1, 0, 0, 0])
@example([2**63 - 1] * 9)
def test_nine_numbers_are_a_header_that_can_be_shown(numbers: list[int]) -> None:
    header = Header.unpack(torch.tensor(numbers))
    assert header.pack().tolist() == numbers
    assert 0 < len(str(header)) < 200
    assert (header in map(Header.unpack, map(torch.tensor, RIGHT))) == (numbers in RIGHT)

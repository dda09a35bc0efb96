"""One of the two processes of tests/pipeline/test_stream.py: `main([case, folder])`, by the environment's rank."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.topology import Topology
from lopt_pp.distributed.world import World, connect
from lopt_pp.errors import StreamError
from lopt_pp.pipeline.boundary import Boundary, boundaries
from lopt_pp.pipeline.messages import Header, dtype_code
from lopt_pp.pipeline.stream import StreamReceiver, StreamSender

HIDDEN = 6


def headers(count: int) -> list[Header]:
    """Of messages of different shapes and dtypes, two to a step."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [
        Header(number // 2, number % 2, 1 + number % 3, 1 + 7 * number % 11, HIDDEN, number % len(dtypes))
        for number in range(count)
    ]


def payload(header: Header) -> torch.Tensor:
    """Any bits at all, infinities and NaNs among them; the same in both processes."""
    dtype = {dtype_code(kind): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}[header.dtype]
    generator = torch.Generator().manual_seed(2 * header.step + header.microbatch)
    size = (*header.shape[:-1], HIDDEN * dtype.itemsize)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(dtype)


def same(arrived: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two messages are the same bit for bit."""
    alike = arrived.shape == right.shape and arrived.dtype == right.dtype
    return alike and torch.equal(arrived.view(torch.uint8), right.view(torch.uint8))


def fresh(world: World, timeout: float = 20) -> Boundary:
    """A boundary of its own for each test, since one that has failed is of no more use."""
    return boundaries(world, Topology(2, 2), timeout)[0]


def sent_and_received(world: World, folder: Path) -> list[str]:
    """For several depths, what arrived wrong."""
    wrong = []
    for depth in (1, 2, 5, 40):
        boundary, expected = fresh(world), headers(23)
        if world.rank == 0:
            sender = StreamSender(boundary, expected, depth)
            for header in expected:
                sender.send(payload(header))
            sender.close()
        else:
            receiver = StreamReceiver(boundary, expected, depth)
            for header in expected:
                if not same(receiver.receive(), payload(header)):
                    wrong.append(f"depth {depth}: {header}")
            receiver.close()
    return wrong


def run_ahead(world: World, folder: Path) -> list[tuple[int, int, int]]:
    """(depth, messages that the receiver took before it stopped, messages that the sender could hand on)."""
    counts = []
    for depth in (1, 3):
        for taken in (0, 2):
            boundary, expected = fresh(world, timeout=1), headers(50)
            ready, over = f"ready/{depth}/{taken}", f"over/{depth}/{taken}"
            if world.rank == 0:
                world.store.wait([ready])
                sender = StreamSender(boundary, expected, depth)
                sent = 0
                try:
                    for header in expected:
                        sender.send(payload(header))
                        sent += 1
                except StreamError as error:
                    # Not one more left within the timeout: the sender was waiting.
                    assert "stage 1 (rank 1) does not answer for 1 s" in str(error), error
                counts.append((depth, taken, sent))
                world.store.set(over, "")
            else:
                receiver = StreamReceiver(replace(boundary, timeout=20), expected, depth)
                world.store.set(ready, "")
                for _ in range(taken):
                    receiver.receive()
                world.store.wait([over])
    return counts


def buffers(world: World, folder: Path) -> list[int]:
    """How much memory 20 messages have come into, for a queue of three: by its addresses."""
    boundary, expected = fresh(world), [Header(number, 0, 2, 3, HIDDEN) for number in range(20)]
    if world.rank == 0:
        sender = StreamSender(boundary, expected, 3)
        for header in expected:
            sender.send(payload(header))
        sender.close()
        return []
    receiver = StreamReceiver(boundary, expected, 3)
    addresses = [receiver.receive().data_ptr() for _ in expected]
    receiver.close()
    return [len(set(addresses)), len(set(addresses[:4]))]


def shapes_known_late(world: World, folder: Path) -> list[str]:
    """Two phases in each of three steps, as in reinforcement learning: the shapes of the second phase are made up by
    the receiver once it has all of the first phase, and the sender hears of them. What arrived wrong, by depth."""
    wrong = []
    for depth in (1, 2, 5):
        boundary, known = fresh(world), dict[int, list[int]]()

        def expected(known: dict[int, list[int]] = known) -> Iterator[Header | None]:
            for step in range(3):
                yield from (Header(step, number, 2, 3, HIDDEN) for number in range(2))
                while step not in known:
                    yield None
                yield from (Header(step, 2 + number, 1, tokens, HIDDEN) for number, tokens in enumerate(known[step]))

        sender = StreamSender(boundary, expected(), depth) if world.rank == 0 else None
        receiver = StreamReceiver(boundary, expected(), depth) if world.rank == 1 else None
        for step in range(3):
            first = [Header(step, number, 2, 3, HIDDEN) for number in range(2)]
            for header in first:
                if sender is not None:
                    sender.send(payload(header))
                elif receiver is not None and not same(receiver.receive(), payload(header)):
                    wrong.append(f"depth {depth}: {header}")
            key = f"late/{depth}/{step}"
            if receiver is not None:
                world.store.set(key, json.dumps([3 + step, 9 - step, 1][: 1 + step]))
            known[step] = json.loads(world.store.get(key))
            for number, tokens in enumerate(known[step]):
                header = Header(step, 2 + number, 1, tokens, HIDDEN)
                if sender is not None:
                    sender.send(payload(header))
                elif receiver is not None and not same(receiver.receive(), payload(header)):
                    wrong.append(f"depth {depth}: {header}")
        for end in (sender, receiver):
            if end is not None:
                end.close()
    return wrong


def disagree_late(world: World, folder: Path) -> str | None:
    """What the receiver says where the two ends come to know other shapes."""
    boundary, known = fresh(world), False

    def expected() -> Iterator[Header | None]:
        yield Header(0, 0, 2, 3, HIDDEN)
        while not known:
            yield None
        yield Header(0, 1, 1, 4 + world.rank, HIDDEN)

    if world.rank == 0:
        sender = StreamSender(boundary, expected(), 2)
        sender.send(payload(Header(0, 0, 2, 3, HIDDEN)))
        known = True
        sender.send(payload(Header(0, 1, 1, 4, HIDDEN)))
        world.store.wait(["late/heard"])
        return None
    receiver = StreamReceiver(boundary, expected(), 2)
    receiver.receive()
    known = True
    try:
        receiver.receive()
    except StreamError as error:
        return str(error)
    finally:
        world.store.set("late/heard", "")
    return None


DISAGREEMENTS: dict[str, Callable[[list[Header]], Sequence[Header]]] = {
    "step": lambda expected: [*expected[:2], replace(expected[2], step=5), *expected[3:]],
    "microbatch": lambda expected: [expected[0], replace(expected[1], microbatch=3), *expected[2:]],
    "rows": lambda expected: [*expected[:3], replace(expected[3], rows=9)],
    "tokens": lambda expected: [replace(expected[0], tokens=99), *expected[1:]],
    "hidden": lambda expected: [replace(header, hidden=8) for header in expected],
    "dtype": lambda expected: [*expected[:3], replace(expected[3], dtype=1)],
    "fewer": lambda expected: expected[:3],
    "more": lambda expected: [*expected, Header(9, 0, 1, 1, HIDDEN)],
}


def disagreement(world: World, folder: Path) -> dict[str, str]:
    """By kind, what the receiver says of a sender whose headers differ from its own."""
    said = {}
    for kind, change in DISAGREEMENTS.items():
        boundary = fresh(world)
        expected = [Header(number // 2, number % 2, 2, 3 + number, HIDDEN) for number in range(4)]
        if world.rank == 0:
            announced = change(expected)
            sender = StreamSender(boundary, announced, queue_depth=8)
            for header in announced:
                sender.send(torch.zeros(header.shape, dtype=(torch.float32, torch.bfloat16)[header.dtype]))
        else:
            receiver = StreamReceiver(boundary, expected, queue_depth=8)
            try:
                for _ in expected:
                    receiver.receive()
                receiver.close()
            except StreamError as error:
                said[kind] = str(error)
        world.store.set(f"{kind}/{world.rank}", "")
        world.store.wait([f"{kind}/0", f"{kind}/1"])  # The sender's buffers live until the receiver has judged.
    return said


def wrong_tensor(world: World, folder: Path) -> list[str]:
    """What the sender says to tensors that are not what it has announced."""
    said = []
    for wrong in (torch.ones(2, 4, HIDDEN), torch.ones(2, 3, HIDDEN, dtype=torch.bfloat16), torch.ones(6, HIDDEN)):
        boundary = fresh(world)
        if world.rank == 0:
            try:
                StreamSender(boundary, [Header(0, 0, 2, 3, HIDDEN)], 1).send(wrong)
            except StreamError as error:
                said.append(str(error))
    return said


def peer_gone(world: World, folder: Path) -> str:
    """What the receiver says when the sender's process has ended before its last message."""
    boundary, expected = fresh(world), headers(3)
    if world.rank == 0:
        sender = StreamSender(boundary, expected, 1)
        sender.send(payload(expected[0]))
        world.store.wait(["received"])
        os._exit(0)
    receiver = StreamReceiver(boundary, expected, 1)
    receiver.receive()
    world.store.set("received", "")
    try:
        receiver.receive()
    except StreamError as error:
        return str(error)
    return ""


class Until:
    """Stops the run before a step, which has been decided up to another."""

    def __init__(self, end: int, known: int = 1000) -> None:
        self.end, self.known = end, known

    def is_decided(self, step: int) -> bool:
        return step < self.known

    def runs(self, step: int) -> bool:
        assert self.is_decided(step)
        return step < self.end


def stopped(world: World, folder: Path) -> list[tuple[int, int, int]]:
    """(depth, step before which it ends, messages), of a stream of 4 steps of 3 messages that ends early or not."""
    counts = []
    for depth in (1, 2, 5):
        for end in (0, 1, 2, 4):
            boundary, number, step = fresh(world), 0, 0
            expected = [Header(step, microbatch, 1, 2, HIDDEN) for step in range(4) for microbatch in range(3)]
            if world.rank == 0:
                stop_signal: Until | StreamReceiver = Until(end)
                sender = StreamSender(boundary, expected, depth, stop_signal)
            else:
                stop_signal = receiver = StreamReceiver(boundary, expected, depth)
            while step < 4 and stop_signal.runs(step):
                for _ in range(3):
                    if world.rank == 0:
                        sender.send(payload(expected[number]))
                    else:
                        pair = receiver.receive(), payload(expected[number])
                        assert torch.equal(*(tensor.view(torch.uint8) for tensor in pair))
                    number += 1
                step += 1
            (sender if world.rank == 0 else receiver).close()
            counts.append((depth, step, number))
    return counts


def unknown(world: World, folder: Path) -> list[Any]:
    """Sender: (step it knows to be made, headers announced) in turn. Receiver: the steps, as it learns of them."""
    boundary, expected = fresh(world), [Header(step, 0, 1, 2, HIDDEN) for step in range(4)]
    if world.rank == 1:
        receiver, known = StreamReceiver(boundary, expected, 2), []
        for step in range(4):
            assert receiver.runs(step)
            known.append(step)
            receiver.receive()
        receiver.close()
        return known
    stop_signal, counts = Until(4, known=0), []
    sender = _Counting(boundary, expected, 2, stop_signal)
    for step in range(4):
        counts.append((step, sender.announced))
        stop_signal.known = (1, 3, 3, 4)[step]
        sender.send(payload(expected[step]))
    sender.close()
    return counts


class _Counting(StreamSender):
    """Counts its headers."""

    announced = 0

    def _send_header(self, header: Header) -> None:
        self.announced += not header.is_end
        super()._send_header(header)


CASES: dict[str, Callable[[World, Path], object]] = {
    "sent_and_received": sent_and_received,
    "run_ahead": run_ahead,
    "buffers": buffers,
    "disagreement": disagreement,
    "wrong_tensor": wrong_tensor,
    "peer_gone": peer_gone,
    "stopped": stopped,
    "unknown": unknown,
    "shapes_known_late": shapes_known_late,
    "disagree_late": disagree_late,
}


def main(arguments: Sequence[str]) -> int:
    case, folder = arguments[0], Path(arguments[1])
    with connect(PipelineConfig()) as world:
        result = CASES[case](world, folder)
        (folder / f"{case}-{world.rank}.json").write_text(json.dumps(result))
    return 0

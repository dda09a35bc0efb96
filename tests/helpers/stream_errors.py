"""What the ends of a stream say when they disagree, or when one is gone; cases of `stream_worker`."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from stream_messages import HIDDEN, fresh, headers, payload

from lopt_pp.distributed.world import World
from lopt_pp.errors import StreamError
from lopt_pp.pipeline.messages import Header
from lopt_pp.pipeline.stream import StreamReceiver, StreamSender


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
    "sequences": lambda expected: [*expected[:3], replace(expected[3], sequences=9)],
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

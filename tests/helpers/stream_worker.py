"""One of the two processes of tests/pipeline/test_stream.py: `main([case, folder])`, by the environment's rank."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stream_errors import disagree_late, disagreement, peer_gone, wrong_tensor
from stream_messages import HIDDEN, fresh, headers, payload, same

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.distributed.world import World, connect
from lopt_pp.errors import StreamError
from lopt_pp.pipeline.messages import Header
from lopt_pp.pipeline.stream import StreamReceiver, StreamSender


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


class Until:
    """Stops the run before a place, which has been decided up to a step."""

    def __init__(self, *end: int, known: int = 1000) -> None:
        self.end, self.known = end, known

    def is_decided(self, step: int, held_out: int = 0) -> bool:
        return step < self.known

    def runs(self, step: int, held_out: int = 0) -> bool:
        assert self.is_decided(step)
        return (step, held_out) < self.end


def stopped(world: World, folder: Path) -> list[tuple[int, tuple[int, ...], int]]:
    """(depth, place before which it ends, messages), of a stream of 4 steps of 3 messages that ends early or not.

    After the second step there are 2 held-out microbatches.
    """
    expected = [Header(step, microbatch, 1, 2, HIDDEN) for step in range(4) for microbatch in range(3)]
    expected[6:6] = [Header(1, 2 + number, 1, 3, HIDDEN, held_out=number) for number in (1, 2)]
    counts: list[tuple[int, tuple[int, ...], int]] = []
    for depth in (1, 2, 5):
        for end in ((0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (4, 0)):
            boundary, number = fresh(world), 0
            if world.rank == 0:
                stop_signal: Until | StreamReceiver = Until(*end)
                sender = StreamSender(boundary, expected, depth, stop_signal)
            else:
                stop_signal = receiver = StreamReceiver(boundary, expected, depth)
            for header in expected:
                if not stop_signal.runs(*header.place):
                    break
                if world.rank == 0:
                    sender.send(payload(header))
                else:
                    pair = receiver.receive(), payload(header)
                    assert torch.equal(*(tensor.view(torch.uint8) for tensor in pair))
                number += 1
            (sender if world.rank == 0 else receiver).close()
            counts.append((depth, end, number))
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
    stop_signal, counts = Until(4, 0, known=0), []
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

"""The stream over NCCL, imitated on CPUs with threads for ranks; see `nccl_imitation`."""

import ast
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import nccl_texts
import pytest
import torch
import torch.distributed as dist
from gpu_imitation import Device
from nccl_imitation import GlooGroup, NcclGroup, NcclOptions, Network, Work, imitated

import lopt_pp
from lopt_pp.config.topology import Topology
from lopt_pp.distributed.world import World
from lopt_pp.errors import StreamError
from lopt_pp.pipeline.boundary import Boundary, boundaries
from lopt_pp.pipeline.messages import Header
from lopt_pp.pipeline.stream import StreamReceiver, StreamSender

__all__ = ["imitated"]

pytestmark = pytest.mark.usefixtures("imitated")

HIDDEN = 4


def headers(messages: int) -> list[Header]:
    """Of messages of several lengths, three to a step."""
    return [Header(number // 3, number % 3, 1, 1 + number % 4, HIDDEN) for number in range(messages)]


class Rank:
    """One process of a pipeline with a stage for each, and its ends of the boundaries."""

    def __init__(self, network: Network, stage: int, one_queue: bool = False, timeout: float = 60) -> None:
        self.device = Device(one_queue)
        self.gloo, self.nccl = GlooGroup(network, stage), NcclGroup(network, stage, self.device)
        self._stage, self._timeout = stage, timeout

    def boundary(self, stage: int) -> Boundary:
        """The one after a stage."""
        headers: Any = self.gloo
        payload: Any = self.nccl
        return Boundary(stage, stage + 1, stage, headers, payload, torch.device("cpu"), self._timeout)

    def run(self, expected: Sequence[Header], is_last: bool, depth: int) -> list[torch.Tensor]:
        """Has every message plus one sent on, or gives what has come; all computation is by the device."""
        receiver = StreamReceiver(self.boundary(self._stage - 1), expected, depth) if self._stage > 0 else None
        decided: dict[str, Any] = {} if receiver is None else {"stop_signal": receiver}
        sender = None if is_last else StreamSender(self.boundary(self._stage), expected, depth, **decided)
        arrived = []
        for number, header in enumerate(expected):
            inputs = receiver.receive() if receiver is not None else torch.full(header.shape, float(number))
            output = torch.empty(header.shape)
            self.device.default_stream.kernel(_adds_one(inputs, output))
            if sender is not None:
                sender.send(output)
            else:
                arrived.append(output)
        for end in (sender, receiver):
            if end is not None:
                end.close()
        self.device.default_stream.synchronize()
        return arrived


def _adds_one(inputs: torch.Tensor, output: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.add(inputs, 1, out=output)


def one_boundary(network: Network, timeout: float = 60) -> tuple[Rank, Boundary, Boundary]:
    """The receiving process, its end of the boundary, and the other end."""
    source, target = (Rank(network, stage, timeout=timeout) for stage in (0, 1))
    return target, target.boundary(0), source.boundary(0)


@contextmanager
def posted(rank: Rank) -> Iterator[list[Work]]:
    """What a rank posts meanwhile."""
    works, post = [], rank.nccl.post

    def recorded(*arguments: Any) -> Work:
        works.append(post(*arguments))
        return works[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank.nccl, "post", recorded)
        yield works


def receive(boundary: Boundary) -> tuple[Any, torch.Tensor]:
    buffer = torch.zeros(1, 1, HIDDEN)
    return boundary.receive(buffer, boundary.payload, 0), buffer


def post_both(here: Boundary, there: Boundary) -> tuple[Any, Any]:
    """Posts the first message at both ends, which make their communicator."""
    with ThreadPoolExecutor(1) as other:
        sent = other.submit(there.send, torch.ones(1, 1, HIDDEN), there.payload, 0)
        return receive(here)[0], sent.result(60)


CAUSES = {
    nccl_texts.DUPLICATE_GPU: "NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.29.3: "
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4a000",
    nccl_texts.SHARED_MEMORY: "NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version "
    "2.29.3: Error while creating shared memory segment /dev/shm/nccl-xT9QyA (size 9637888)",
    nccl_texts.RESET: "NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.29.3: "
    "socketProgress: Connection closed by remote peer node1<53414>",
    nccl_texts.REMOTE: "NCCL error: remote process exited or there was a network error, NCCL version 2.29.3",
    nccl_texts.ILLEGAL_ACCESS: "CUDA error: an illegal memory access was encountered",
    nccl_texts.NO_STORE: nccl_texts.NO_STORE.splitlines()[0],
}
"""What is to be told of what NCCL and CUDA say."""
GONE = (nccl_texts.RESET, nccl_texts.REMOTE)
"""Of these, what says that the neighbour is gone."""


@pytest.mark.parametrize("text", CAUSES)
@pytest.mark.parametrize("when", ["it is posted", "it is waited for"])
def test_the_cause_of_a_failure_is_told_and_a_neighbour_that_lives_is_not_called_dead(text: str, when: str) -> None:
    network = Network()
    _, here, there = one_boundary(network)
    with pytest.raises(StreamError) as raised:
        if when == "it is posted":
            network.refuses = text
            receive(here)
        else:
            post_both(here, there)
            late, _ = receive(here)
            network.error = text
            here.wait(late, "receiving", 0, None)
    who = "stage 0 (rank 0) has died or left" if text in GONE else "stage 1 (rank 1), with stage 0 (rank 0)"
    assert str(raised.value) == f"{who}: receiving failed: {CAUSES[text]}"


@pytest.mark.parametrize("one_queue", [False, True], ids=["a queue for each stream", "one queue"])
@pytest.mark.parametrize(("stages", "depth"), [(2, 1), (2, 2), (3, 2), (4, 2), (4, 3), (4, 1)])
def test_messages_arrive_in_order_and_nothing_locks_up(stages: int, depth: int, one_queue: bool) -> None:
    network, expected = Network(), headers(14)
    with ThreadPoolExecutor(stages) as pool:
        runs = [
            pool.submit(Rank(network, stage, one_queue).run, expected, stage == stages - 1, depth)
            for stage in range(stages)
        ]
        *_, arrived = [run.result(100) for run in runs]
    assert [tensor.flatten()[0].item() for tensor in arrived] == [number + stages for number in range(14)]
    assert [tuple(tensor.shape) for tensor in arrived] == [header.shape for header in expected]


def test_a_message_that_does_not_come_is_a_time_out_and_not_a_death() -> None:
    _, here, there = one_boundary(Network(), timeout=0.2)
    first, _ = post_both(here, there)
    here.wait(first, "receiving", 0, None)
    late, _ = receive(here)
    with pytest.raises(
        StreamError, match=r"^stage 0 \(rank 0\) does not answer for 0\.2 s \(--stream_timeout\): recei"
    ):
        here.wait(late, "receiving", 0, headers(1)[0])


def test_the_time_of_a_time_out_is_counted_from_when_the_stage_waits() -> None:
    """A receive is posted long before it is needed: what the stage computes meanwhile is not the neighbour's time."""
    now = [0.0]
    target, here, there = one_boundary(Network(clock=lambda: now[0]), timeout=30)
    post_both(here, there)
    with posted(target) as works:
        late, buffer = receive(here)
    now[0] += 1000
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(here.wait, late, "receiving", 0, None)
        assert works[0].waited_for.wait(60)
        there.send(torch.full((1, 1, HIDDEN), 5.0), there.payload, 0)
        waiting.result(60)
    assert buffer.flatten().tolist() == [5.0] * HIDDEN


def test_weights_can_be_copied_while_a_message_is_waited_for() -> None:
    """NCCL's own wait with a time would first have the default stream wait, and all that is copied on it with it."""
    target, here, there = one_boundary(Network())
    post_both(here, there)
    with posted(target) as works:
        late, _ = receive(here)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(here.wait, late, "receiving", 0, None)
        assert works[0].waited_for.wait(60)
        assert target.device.default_stream.synchronize(5), "a copy stands behind a message that has not come"
        there.send(torch.ones(1, 1, HIDDEN), there.payload, 0)
        waiting.result(60)


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_pairs_are_connected_before_the_first_step(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, whatever the number of stages: a middle stage connects with one neighbour and then with the other,
    each of which waits until it does. The two groups are of one backend each, and the payloads' has its options."""
    network, made = Network(), queue.SimpleQueue[tuple[str, timedelta | None, Any]]()
    monkeypatch.setattr(dist, "ProcessGroupNCCL", NcclOptions, raising=False)
    ranks = [Rank(network, stage) for stage in range(stages)]
    here = threading.local()

    def new_group(backend: str, timeout: timedelta | None = None, pg_options: Any = None) -> Any:
        made.put((backend, timeout, pg_options))
        return here.rank.nccl if backend == "nccl" else here.rank.gloo

    monkeypatch.setattr(dist, "new_group", new_group)

    def connect(stage: int) -> set[int]:
        here.rank, store = ranks[stage], dist.HashStore()
        return {
            *boundaries(World(stage, stages, torch.device("cpu"), "nccl", store, store), Topology(stages, stages), 60)
        }

    with ThreadPoolExecutor(stages) as pool:
        own = [*pool.map(connect, range(stages))]
    assert own == [{stage - 1, stage} & {*range(stages - 1)} for stage in range(stages)]
    assert {pair: len(tags) for pair, tags in network.messages.items()} == {(s, s + 1): 1 for s in range(stages - 1)}
    while not made.empty():
        backend, timeout, options = made.get()
        if backend == "nccl":
            assert timeout is not None and timeout > timedelta(seconds=1e8) and options._timeout == timeout
            assert options.is_high_priority_stream and options.config.max_ctas in (1, 2)


def test_a_neighbour_that_does_not_connect_is_a_time_out() -> None:
    """NCCL does not return from the first message of a pair before the other end posts it too."""
    _, here, _ = one_boundary(Network(), timeout=0.2)
    with pytest.raises(StreamError, match=r"^stage 0 \(rank 0\) does not answer for 0\.2 s \(--stream_timeout\): conn"):
        here.warm_up(1)


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_what_a_middle_stage_sends_does_not_stand_behind_its_receives(eager: bool) -> None:
    """So it is as long as NCCL makes its communicators by itself, one for each pair: never give `device_id`."""
    network, expected = Network(eager=eager), headers(2)
    first, middle, last = (Rank(network, stage, timeout=60 if stage < 2 or not eager else 0.5) for stage in range(3))
    with ThreadPoolExecutor(2) as pool:
        source = StreamSender(first.boundary(0), expected, 2)

        def hand_on() -> None:
            receiver = StreamReceiver(middle.boundary(0), expected, 2)
            sender = StreamSender(middle.boundary(1), expected, 2, receiver)
            sender.send(receiver.receive().clone())

        handed_on = pool.submit(hand_on)
        source.send(torch.ones(expected[0].shape))  # And no other one, though it is announced.
        target = StreamReceiver(last.boundary(1), expected, 1)
        if eager:
            with pytest.raises(StreamError, match=r"^stage 1 \(rank 1\) does not answer"):
                target.receive()
        else:
            assert target.receive().eq(1).all()
            handed_on.result(60)


def test_no_group_is_told_its_device() -> None:
    """With `device_id` NCCL makes its communicators at once, and is the eager one of the test above."""
    makers, found = ("init_process_group", "new_group", "split_group", "init_device_mesh"), []
    for path in Path(lopt_pp.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in makers:
                found.append((path.name, [keyword.arg for keyword in node.keywords]))
    assert {name for name, _ in found} >= {"groups.py", "boundary.py"}
    assert not [(name, given) for name, given in found if {"device_id", None} & {*given}]

"""How launchers meet, and what they say when they cannot."""

import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from ranks import until
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError

from lopt_pp.distributed.rendezvous import Rendezvous, create_rendezvous
from lopt_pp.distributed.store import serve


def parameters(endpoint: str = "", nodes: tuple[int, int] = (1, 1), **more: Any) -> RendezvousParameters:
    return RendezvousParameters("lopt-pp", endpoint, "a-run", *nodes, **more)


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_torchrun_knows_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And says in a line each how it ended, but for what is a mistake in it."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    assert isinstance(rendezvous_handler_registry.create_handler(parameters()), Rendezvous)
    failures = {1: ProcessFailure(0, 4, -9, ""), 2: ProcessFailure(1, 5, 1, "")}
    for error in (SignalException("", signal.SIGTERM), ChildFailedError("python", failures), ValueError("a mistake")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err.splitlines() == [
        "torchrun: ended by SIGTERM",
        "torchrun: the process of rank 1 was ended by SIGKILL",
        "torchrun: the process of rank 2 has ended with status 1",
        "ValueError: a mistake",
    ]


def test_one_machine_meets_itself_at_a_free_port_of_the_loopback_interface() -> None:
    first, second = create_rendezvous(parameters()), create_rendezvous(parameters())
    met = [rendezvous.next_rendezvous() for rendezvous in (first, second)]
    places = [info.bootstrap_store_info for info in met]
    assert [(info.rank, info.world_size) for info in met] == [(0, 1), (0, 1)]
    assert [place.master_addr for place in places if place] == ["127.0.0.1"] * 2
    assert len({place.master_port for place in places if place}) == 2


def barrier(nodes: Sequence[Rendezvous]) -> list[RendezvousInfo]:
    """Where the launchers of several machines come to, which wait for each other."""
    with ThreadPoolExecutor(len(nodes)) as threads:
        return list(threads.map(Rendezvous.next_rendezvous, nodes))


def machines(number: int, port: int) -> list[Rendezvous]:
    return [create_rendezvous(parameters(f"127.0.0.1:{port}", (number, number), timeout="20")) for _ in range(number)]


def test_machines_are_numbered_as_they_come(port: int) -> None:
    met = barrier(machines(3, port))
    assert sorted(info.rank for info in met) == [0, 1, 2] and {info.world_size for info in met} == {3}
    assert len({place.master_port for info in met if (place := info.bootstrap_store_info)}) == 1
    met[2].store.set("key", "value")
    assert met[0].store.get("key") == b"value"
    with pytest.raises(RendezvousConnectionError, match="all 3 machines of the run a-run are there"):
        machines(3, port)[0].next_rendezvous()


def test_a_run_that_is_started_again(port: int) -> None:
    """One machine calls for it, and the other hears."""
    first, second = nodes = machines(2, port)
    before = barrier(nodes)
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0]
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(second.next_rendezvous)
        until(lambda: first.num_nodes_waiting() == 1)
        after = [first.next_rendezvous(), waiting.result()]
    assert [info.rank for info in after] == [info.rank for info in before]
    assert [node.num_nodes_waiting() for node in nodes] == [0, 0]
    before[0].store.set("key", "old")
    assert not after[0].store.check(["key"]), "what the launchers said before is forgotten"


def test_a_machine_that_has_left_is_not_waited_for(port: int) -> None:
    nodes = machines(2, port)
    barrier(nodes)
    assert nodes[1].shutdown()
    with pytest.raises(RendezvousClosedError, match="another machine has left the run a-run"):
        nodes[0].next_rendezvous()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (parameters(nodes=(1, 2)), "give --nnodes one number"),
        (parameters(nodes=(2, 2)), "--rdzv-endpoint: give ADDRESS:PORT"),
        (parameters("10.0.0.1", nodes=(2, 2)), "--rdzv-endpoint: give ADDRESS:PORT"),
        (parameters("10.0.0.1:x"), "port number"),
    ],
)
def test_what_does_not_fit_is_said(given: RendezvousParameters, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_rendezvous(given)


def test_a_name_that_is_the_loopback_address_to_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **more: found)
    with pytest.raises(ValueError, match=r"node-a is 127\.0\.1\.1 on this machine, where no other .* /etc/hosts"):
        create_rendezvous(parameters("node-a:29500", nodes=(2, 2)))


def test_a_port_that_is_taken(port: int) -> None:
    store = serve("127.0.0.1", port)
    assert store.port == port
    with pytest.raises(OSError, match="in use"):
        serve("127.0.0.1", port)
    with pytest.raises(RendezvousConnectionError, match=f"cannot listen at 127.0.0.1:{port}: .*in use"):
        create_rendezvous(parameters(f"127.0.0.1:{port}")).next_rendezvous()


def test_nobody_answers() -> None:
    """The address is one of those that are set aside for examples."""
    lost = Rendezvous("192.0.2.1", 29500, 2, "a-run", timedelta(seconds=1))
    with pytest.raises(RendezvousConnectionError, match=r"no launcher of this run answers at 192\.0\.2\.1:29500"):
        lost.next_rendezvous()

"""How launchers meet, and what they say when they cannot."""

import socket
from datetime import timedelta

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

from lopt_pp.rendezvous import Rendezvous, create_rendezvous
from lopt_pp.store import serve


def parameters(endpoint: str = "", nodes: tuple[int, int] = (1, 1), **more: str) -> RendezvousParameters:
    return RendezvousParameters("lopt-pp", endpoint, "a-run", *nodes, **more)


@pytest.fixture
def port() -> int:
    """A free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_torchrun_knows_it() -> None:
    assert isinstance(rendezvous_handler_registry.create_handler(parameters()), Rendezvous)


def test_one_machine_meets_itself_at_a_free_port_of_the_loopback_interface() -> None:
    first, second = create_rendezvous(parameters()), create_rendezvous(parameters())
    met = [rendezvous.next_rendezvous() for rendezvous in (first, second)]
    places = [info.bootstrap_store_info for info in met]
    assert [(info.rank, info.world_size) for info in met] == [(0, 1), (0, 1)]
    assert [place.master_addr for place in places if place] == ["127.0.0.1"] * 2
    assert len({place.master_port for place in places if place}) == 2


def test_machines_are_numbered_as_they_come(port: int) -> None:
    nodes = [create_rendezvous(parameters(f"127.0.0.1:{port}", (3, 3))) for _ in range(4)]
    met = [node.next_rendezvous() for node in nodes[:3]]
    assert [(info.rank, info.world_size) for info in met] == [(0, 3), (1, 3), (2, 3)]
    met[2].store.set("key", "value")
    assert met[0].store.get("key") == b"value"
    with pytest.raises(RendezvousConnectionError, match="all 3 machines of a-run are there already"):
        nodes[3].next_rendezvous()
    with pytest.raises(RendezvousConnectionError, match="not restarted"):
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

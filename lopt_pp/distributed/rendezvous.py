"""How torchrun's launchers meet for a run, by `--rdzv-backend lopt-pp`: at one address, and without pickles.

    torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train FLAGS            one machine, loopback only
    torchrun --rdzv-backend lopt-pp --rdzv-endpoint 10.0.0.1:29500 --nnodes 2 ...        the same on two machines

torchrun's own (`c10d`, which `--standalone` means) opens ports on all interfaces and unpickles what it finds in
a store behind one: whoever reaches that port can run code in the launcher. Here launchers tell each other strings,
numbers and JSON, and the store listens at the endpoint's address alone.
"""

import errno
import ipaddress
import socket
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lopt_pp.distributed.store import LOOPBACK, serve


class Rendezvous(RendezvousHandler):
    """The launchers of a run, a fixed number, as torchrun asks for them.

    The machine that the endpoint's address belongs to holds the store and is the first; the others are numbered as they
    come. They meet once for each start of the run (`--max-restarts`). The processes that train use the same store, for
    all starts, as they do with torchrun's own; see `lopt_pp.distributed.restarts`.

    Args:
        host: where the store is.
        port: of the store; 0 for any that is free, on one machine.
        num_nodes: number of machines.
        run_id: tells apart runs that meet at the same port.
        timeout: to wait for the other machines.
        rank: of this machine, where that is known; the first holds the store then. None: numbered as they come.
    """

    def __init__(
        self, host: str, port: int, num_nodes: int, run_id: str, timeout: timedelta, rank: int | None = None
    ) -> None:
        self._host = host
        self._port = port
        self._num_nodes = num_nodes
        self._run_id = run_id
        self._timeout = timeout
        self._given_rank = rank
        self._rank = rank or 0
        self._round = 0
        self._server: TCPStore | None = None
        self._state: Store | None = None

    def get_backend(self) -> str:
        return "lopt-pp"

    @property
    def use_agent_store(self) -> bool:
        """The launcher holds the store of the processes that train."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        state = self._state or self._join()
        self._round += 1
        try:
            if state.add(f"come/{self._round}", 1) == self._num_nodes:
                state.compare_set(f"outcome/{self._round}", "", "complete")
            state.wait([f"outcome/{self._round}"], self._timeout)
            if state.get(f"outcome/{self._round}") != b"complete":
                raise RendezvousClosedError(f"another machine has left the run {self._run_id}")
        except RuntimeError as error:
            raise RendezvousConnectionError(
                f"the {self._num_nodes} machines of the run {self._run_id} did not come together: {error}"
            ) from error
        port = self._port if self._server is None else self._server.port
        meeting = PrefixStore(f"meeting/{self._round}", state)
        return RendezvousInfo(meeting, self._rank, self._num_nodes, RendezvousStoreInfo(self._host, port))

    def open(self) -> int:
        """Opens the store ahead of the meeting, where it is this machine's; returns the port that it listens at."""
        self._join()
        return self._port if self._server is None else self._server.port

    def _join(self) -> Store:
        """Opens the store, or connects to it, and takes a number."""
        store = self._open()
        self._state = PrefixStore(f"rendezvous/{self._run_id}", store)
        if self._server is None and self._given_rank is None:
            self._rank = self._state.add("machines", 1)
        if self._rank >= self._num_nodes:
            raise RendezvousConnectionError(f"all {self._num_nodes} machines of the run {self._run_id} are there")
        return self._state

    def _open(self) -> TCPStore:
        place = f"{self._host}:{self._port}"
        if self._given_rank:
            return self._connect(place)
        try:
            self._server = serve(self._host, self._port, timeout=self._timeout)
            return self._server
        except OSError as error:
            # EADDRINUSE: by another launcher on this machine.
            if self._num_nodes == 1 or error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                raise RendezvousConnectionError(f"cannot listen at {place}: {error}") from error
        return self._connect(place)

    def _connect(self, place: str) -> TCPStore:
        try:
            return TCPStore(self._host, self._port, is_master=False, timeout=self._timeout)
        except RuntimeError as error:
            raise RendezvousConnectionError(f"no launcher of this run answers at {place}: {error}") from error

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Lets those go that wait for this machine, or will."""
        if self._state is None:
            return
        with suppress(RuntimeError):  # The store may be gone with its launcher.
            # Nobody is further ahead, since each meeting takes all machines.
            self._state.compare_set(f"outcome/{self._round + 1}", "", "closed")

    def num_nodes_waiting(self) -> int:
        """How many machines wait for this one to start the run again with them."""
        return 0 if self._state is None else self._state.add(f"come/{self._round + 1}", 0)

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self.set_closed()
        return True


def create_rendezvous(parameters: RendezvousParameters) -> Rendezvous:
    """The rendezvous that torchrun's `--rdzv-endpoint`, `--rdzv-id` and `--nnodes` ask for.

    `--rdzv-conf timeout=SECONDS` is how long to wait for the other machines (900).

    Raises:
        ValueError: they do not fit together.
    """
    num_nodes = parameters.max_nodes
    if parameters.min_nodes != num_nodes:
        raise ValueError("--rdzv-backend lopt-pp has a fixed number of machines: give --nnodes one number")
    host, port = parse_rendezvous_endpoint(parameters.endpoint or LOOPBACK, default_port=0)
    if num_nodes > 1:
        if port == 0:
            raise ValueError("--rdzv-endpoint: give ADDRESS:PORT, with an address of one of the machines")
        try:
            check_reachable(host)
        except ValueError as error:
            raise ValueError(f"--rdzv-endpoint: {error}") from error
    timeout = timedelta(seconds=parameters.get_as_int("timeout", 900) or 900)
    return Rendezvous(host, port, num_nodes, parameters.run_id, timeout)


def check_reachable(host: str) -> None:
    """Refuses the name that a machine has for itself where /etc/hosts gives it a loopback address.

    Raises:
        ValueError: no other machine can reach it.
        OSError: it is not known.
    """
    address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    if ipaddress.ip_address(address).is_loopback and host not in ("localhost", address):
        raise ValueError(
            f"{host} is {address} on this machine, where no other machine can reach it (see "
            f"/etc/hosts); give the address that it has in the network"
        )

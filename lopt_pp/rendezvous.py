"""How torchrun's launchers meet for a run, by `--rdzv-backend lopt-pp`: at one address, and without pickles.

    torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train FLAGS            one machine, loopback only
    torchrun --rdzv-backend lopt-pp --rdzv-endpoint 10.0.0.1:29500 --nnodes 2 ...        the same on two machines

torchrun's own (`c10d`, which `--standalone` stands for) opens ports on all interfaces and unpickles what it finds in
the store behind them: whoever reaches such a port can run code in the launcher. Here launchers tell each other strings
and JSON, and the store listens at the endpoint's address alone.

A run has a fixed number of machines; one that fails ends it, since checkpoints are what brings a run back.
"""

import errno
import ipaddress
import socket
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from lopt_pp.store import LOOPBACK, serve


class Rendezvous(RendezvousHandler):
    """The launchers of a run, as torchrun asks for them.

    The machine that the endpoint's address belongs to holds the store and is the first; the others are numbered as they
    come.

    Args:
        host: where the store is.
        port: of the store; 0 for any that is free, on one machine.
        num_nodes: number of machines.
        run_id: tells apart runs that meet at the same port.
        timeout: to wait for the other machines.
    """

    def __init__(self, host: str, port: int, num_nodes: int, run_id: str, timeout: timedelta) -> None:
        self._host = host
        self._port = port
        self._num_nodes = num_nodes
        self._run_id = run_id
        self._timeout = timeout
        self._store: TCPStore | None = None

    def get_backend(self) -> str:
        return "lopt-pp"

    @property
    def use_agent_store(self) -> bool:
        """The processes that train meet in the same store."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is not None and self._num_nodes > 1:
            raise RendezvousConnectionError("a run on several machines is not restarted: give --max-restarts 0")
        is_first, self._store = self._open()
        store = PrefixStore(f"rendezvous/{self._run_id}", self._store)
        rank = 0 if is_first else store.add("come", 1)
        if rank >= self._num_nodes:
            raise RendezvousConnectionError(f"all {self._num_nodes} machines of {self._run_id} are there already")
        return RendezvousInfo(store, rank, self._num_nodes, RendezvousStoreInfo(self._store.host, self._store.port))

    def _open(self) -> tuple[bool, TCPStore]:
        """Whether this machine holds the store, and the store."""
        place = f"{self._host}:{self._port}"
        try:
            return True, serve(self._host, self._port, timeout=self._timeout)
        except OSError as error:
            # EADDRINUSE: by another launcher on this machine.
            if self._num_nodes == 1 or error.errno not in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                raise RendezvousConnectionError(f"cannot listen at {place}: {error}") from error
        try:
            return False, TCPStore(self._host, self._port, is_master=False, timeout=self._timeout)
        except RuntimeError as error:
            raise RendezvousConnectionError(f"no launcher of this run answers at {place}: {error}") from error

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing to do: who comes late is refused anyway."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
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
        _check_reachable(host)
    timeout = timedelta(seconds=parameters.get_as_int("timeout", 900) or 900)
    return Rendezvous(host, port, num_nodes, parameters.run_id, timeout)


def _check_reachable(host: str) -> None:
    """Refuses the name that a machine has for itself where /etc/hosts gives it a loopback address."""
    address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    if ipaddress.ip_address(address).is_loopback and host not in ("localhost", address):
        raise ValueError(
            f"--rdzv-endpoint: {host} is {address} on this machine, where no other machine can reach it (see "
            f"/etc/hosts); give the address that it has in the network"
        )

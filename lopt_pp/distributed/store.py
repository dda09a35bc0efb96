"""The key-value store that joins the processes of a run, and listens at one address only.

A `TCPStore` takes an address to connect to; the one that serves listens on all interfaces. Here it serves from a socket
that has been bound before.
"""

import errno
import ipaddress
import os
import socket
from datetime import timedelta

from torch.distributed import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from lopt_pp.errors import LoptError

LOOPBACK = "127.0.0.1"


def serve(host: str, port: int, world_size: int | None = None, timeout: timedelta = timedelta(minutes=30)) -> TCPStore:
    """A store that listens at one address; it is there for as long as somebody holds it.

    Args:
        host: an address of this machine, or a host name.
        port: to listen at; 0 for any that is free (see the store's `port`).
        world_size: number of processes to wait for; None to wait for none.
        timeout: of that, and of waits on the store.

    Raises:
        OSError: the address is not this machine's, or the port is taken.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # At once, since two sockets may be bound to one address as long as neither listens.
        listener.listen(socket.SOMAXCONN)
        own_host, own_port = listener.getsockname()[:2]
        return TCPStore(
            own_host, own_port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach()
        )


def join(rank: int, size: int, timeout: timedelta = timedelta(minutes=30)) -> TCPStore:
    """The store of a run on this machine alone: rank 0 has it listen on the loopback interface, the others connect.

    Where torchrun has a store of its own, all connect to that. The environment is that of PyTorch's `env://`.

    Args:
        rank: of this process.
        size: number of processes.
        timeout: to wait for the others, and of waits on the store.

    Raises:
        LoptError: the environment names no port, or one that is taken.
    """
    host, port = _meeting_place("MASTER_PORT")
    if has_agent_store() or rank > 0:
        host = host if has_agent_store() else LOOPBACK
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    try:
        return serve(LOOPBACK, port, size, timeout)
    except OSError as error:
        raise LoptError(f"cannot listen at port {port} (MASTER_PORT): {error.strerror}") from error


def join_machines(rank: int, size: int, timeout: timedelta = timedelta(minutes=30)) -> Store:
    """The store of a run on several machines: the launcher's, or rank 0 has it listen at the address that all know.

    Where that address is not one of the machine's own (a service's, a name that means the loopback interface here), it
    listens at all of them, as PyTorch's `env://` has it.

    Raises:
        LoptError: the environment names no address and port, or one that is taken.
    """
    host, port = _meeting_place("MASTER_ADDR", "MASTER_PORT")
    if has_agent_store() or rank > 0:
        return next(iter(rendezvous("env://")))[0]
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        if not ipaddress.ip_address(address).is_loopback:
            return serve(host, port, size, timeout)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LoptError(f"cannot listen at {host}:{port} (MASTER_ADDR, MASTER_PORT): {error.strerror}") from error
    return next(iter(rendezvous("env://")))[0]


def _meeting_place(*needed: str) -> tuple[str, int]:
    """Address and port in the environment.

    Args:
        needed: the variables that must be there.
    """
    number = os.environ.get("WORLD_SIZE")
    for name in needed:
        if name not in os.environ:
            raise LoptError(
                f"the environment has WORLD_SIZE={number} and no {name}; start the processes by torchrun, or unset "
                f"WORLD_SIZE, RANK and LOCAL_RANK where no launcher has started this one"
            )
    if not (port := os.environ["MASTER_PORT"]).isdecimal() or int(port) >= 2**16:
        raise LoptError(f"MASTER_PORT={port} is not a port: 1 to 65535")
    return os.environ.get("MASTER_ADDR", LOOPBACK), int(port)


def has_agent_store() -> bool:
    """Whether the launcher (torchrun) holds the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

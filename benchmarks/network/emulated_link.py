"""A link with delay and a limited rate between two network namespaces, in user space.

The kernel's own `netem` is often not built in. Here each end is a TUN device, and a thread moves packets between the
two. The devices hand over TCP's segments before they are cut to the MTU, up to 64 KiB at once (as virtual machines do),
so that a thread in Python carries hundreds of megabytes per second while TCP counts segments of 1,500 bytes as on a
real link. Linux only. Namespaces and devices have no name outside the processes that made them, and go with them.
"""

import ctypes
import fcntl
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections import deque
from pathlib import Path

DEVICE = "slow0"
ADDRESSES = ("10.201.0.1", "10.201.0.2")
"""Of the two ends. Private to the namespaces: nothing outside can see or be reached by them."""

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x1, 0x2, 0x4
_VNET_HEADER = struct.Struct("=BBHHHH")
_PACKET = _VNET_HEADER.size + 65536


def reason_not_possible() -> str | None:
    """Why this machine cannot have such a link; None where it can."""
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    if shutil.which("ip") is None:
        return "the program `ip` (package iproute2) is not installed"
    # In a process of its own: this one keeps its network.
    child = os.fork()
    if child == 0:
        try:
            enter_namespace(0)
        except (OSError, subprocess.CalledProcessError):
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        return (
            "network namespaces cannot be made here; that takes root, or `unshare --map-root-user` before the command"
        )
    return None


def enter_namespace(end: int) -> int:
    """Moves this process into a new network namespace that holds one end of a link, and nothing else.

    Returns:
        The file descriptor of the end's TUN device.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
    for command in (
        "link set lo up",
        f"address add {ADDRESSES[end]} peer {ADDRESSES[1 - end]} dev {DEVICE}",
        f"link set {DEVICE} up mtu 1500 txqueuelen 20000",
    ):
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
    return device


def tcp_setting(name: str, value: str | None = None) -> str:
    """Reads, or first sets, one of `net.ipv4` for the namespace that this process is in."""
    path = Path("/proc/sys/net/ipv4") / name
    if value is not None:
        path.write_text(value)
    return " ".join(path.read_text().split())


class _Direction:
    """Packets from one device to the other: each leaves when the link is free, and arrives a delay later."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self._target = source, target
        self.delay = 0.0
        self.rate = float("inf")
        self._free_at = 0.0
        self._under_way: deque[tuple[float, bytes]] = deque()

    @property
    def next_arrival(self) -> float:
        return self._under_way[0][0] if self._under_way else float("inf")

    def take(self) -> None:
        """Takes in what the source has handed over, or the first of it."""
        for _ in range(32):
            try:
                packet = os.read(self.source, _PACKET)
            except BlockingIOError:
                return
            self._free_at = max(self._free_at, time.monotonic()) + _bytes_on_the_wire(packet) / self.rate
            self._under_way.append((self._free_at + self.delay, packet))

    def deliver(self) -> None:
        """Hands over what has arrived by now."""
        while self.next_arrival <= time.monotonic():
            os.write(self._target, self._under_way.popleft()[1])


def _bytes_on_the_wire(packet: bytes) -> int:
    """The size of a packet once its segments are cut, each with a header of its own."""
    _, kind, header, segment, _, _ = _VNET_HEADER.unpack_from(packet)
    size = len(packet) - _VNET_HEADER.size
    return size + header * ((size - header - 1) // segment) if kind else size


class EmulatedLink:
    """Moves packets between two devices, in a thread, as long as the context lasts. It loses and reorders none.

    Args:
        devices: file descriptors of the two ends' TUN devices; closed at the end.
    """

    def __init__(self, devices: tuple[int, int]) -> None:
        self._devices = devices
        self._directions = _Direction(*devices), _Direction(*reversed(devices))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slow link", daemon=True)

    def set(self, delay: float, rate: float = float("inf")) -> None:
        """Changes the link, for packets from now on.

        Args:
            delay: seconds, one way.
            rate: bytes per second, each way, IP headers included.
        """
        for direction in self._directions:
            direction.delay, direction.rate = delay, rate

    def __enter__(self) -> "EmulatedLink":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        for device in self._devices:
            os.close(device)

    def _run(self) -> None:
        while not self._over.is_set():
            until = min(direction.next_arrival for direction in self._directions) - time.monotonic()
            ready, _, _ = select.select(self._devices, [], [], min(max(until, 0.0), 0.1))
            for direction in self._directions:
                if direction.source in ready:
                    direction.take()
                direction.deliver()

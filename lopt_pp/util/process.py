"""Processes by names that outlast them, and whether one is still there, as far as this machine can say."""

import os
import signal
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STOPPED_STATUS = 75
"""Of a process that a signal has stopped in good order: `EX_TEMPFAIL` of sysexits.h, "try again later"."""


@contextmanager
def ends_at_ctrl_c() -> Iterator[None]:
    """Lets Ctrl-C end the process at once and without a word, as long as nobody else takes signals.

    For the seconds in which libraries are imported: Python's own `KeyboardInterrupt` may come up in the middle of one
    that swallows it, or that prints a traceback.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # Ignored, or taken by a caller.
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Process:
    """A process of some machine.

    Attributes:
        host: the machine's name, for people.
        machine: tells apart machines, their starts, and containers, whose processes have numbers of their own.
        pid: of the process.
        started: when, in the kernel's ticks since the machine's start: a number may be given anew; empty where that
            is not known.
        parent: pid of the process that had started it.
    """

    host: str
    machine: str
    pid: int
    started: str
    parent: int

    def is_alive(self) -> bool | None:
        """Whether it is there; None where it cannot be known from here."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # Another user's.
            pass
        stat = _stat(self.pid)
        if not stat or not self.started:
            return None
        return stat[_STATE] not in "ZX" and stat[_STARTED] == self.started

    def may_be_ending(self) -> bool:
        """Whether the kernel ends it just now, or the process is gone that had started it. Only where it is alive."""
        stat = _stat(self.pid)
        return bool(stat) and (int(stat[_FLAGS]) & _EXITING != 0 or int(stat[_PARENT]) != self.parent)


def own_process() -> Process:
    """This process."""
    stat = _stat(os.getpid())
    return Process(socket.gethostname(), _machine(), os.getpid(), stat[_STARTED] if stat else "", os.getppid())


_EXITING = 4
"""PF_EXITING of the kernel."""

_STATE, _PARENT, _FLAGS, _STARTED = 0, 1, 6, 19
"""Places among the fields of Linux's /proc/PID/stat that come after the name, which may have spaces."""


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # Not Linux.
        return f"{socket.gethostname()}/{uuid.getnode()}"

"""How processes of a run have ended that could not say so themselves.

When one dies, its neighbours notice and end as well, often before the agent has looked: it names any of them then.
"""

import os
import select
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from lopt_pp.distributed.signals import processes_told

SERVER_GONE = 255
"""What `multiprocessing` takes for the exit status of a process whose fork server has gone, so that nobody knows it."""

_DEADLY = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
"""Signals that end a process by itself. (SIGABRT may be what a library makes of another process's end.)"""

_BEFORE_AGENT_KILLS = 20.0
"""Seconds since all were well in which a SIGKILL is not the agent's, which comes 30 seconds after its SIGTERM."""


def first_deaths(reported: Mapping[int, int], known: Mapping[int, int], seconds: float) -> dict[int, int]:
    """The exit statuses of the processes that failed first, by their ranks.

    Args:
        reported: what the agent names.
        known: of all processes that have ended.
        seconds: since the agent has seen all of them run.
    """
    killed = {rank: status for rank, status in known.items() if -status in _DEADLY}
    return killed if killed and seconds < _BEFORE_AGENT_KILLS else dict(reported)


def exit_statuses(processes: Iterable[BaseProcess], told: Path) -> dict[int, int]:
    """Of the processes among these that have ended, by their ranks.

    Args:
        processes: of this process.
        told: the folder by which launcher and processes know each other.
    """
    ended = {process.pid: process.exitcode for process in processes}
    found = {rank: ended.get(pid) for rank, pid in processes_told(told).items()}
    return {rank: status for rank, status in found.items() if status is not None}


def await_end(told: Path, seconds: float) -> None:
    """Waits for the end of processes that nobody else waits for, since their fork server has gone.

    Args:
        told: see `exit_statuses`.
        seconds: longest time.
    """
    deadline = time.monotonic() + seconds
    for pid in processes_told(told).values():
        with suppress(OSError):  # It is gone.
            process = os.pidfd_open(pid)
            try:
                poll = select.poll()
                poll.register(process, select.POLLIN)
                poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            finally:
                os.close(process)


def in_words(failed: Mapping[int, int]) -> str:
    """Which process was ended by a signal and could not say so itself; empty if none was.

    Args:
        failed: exit statuses of the processes that failed first, by their ranks.
    """
    memory = "most likely because memory ran out (the kernel's log says so: dmesg or journalctl -k; under Slurm sacct)"
    for rank, status in failed.items():
        if status == SERVER_GONE:
            return f"the process that those of the run are forked from was ended, {memory}"
        if status < 0:
            name = signal.Signals(-status).name
            return f"the process of rank {rank} was ended by {name}" + (f", {memory}" if name == "SIGKILL" else "")
    return ""

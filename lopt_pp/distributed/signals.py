"""How a launcher hands signals on to the processes of its run, and gives them time to end in good order.

The two know each other by files in a folder: each process leaves its number there, and the launcher, once it has had a
signal, which one. So none is missed that is just starting.
"""

import itertools
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Self

from torch.distributed.elastic.multiprocessing import SignalException

from lopt_pp.distributed.fork_server import end_server

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

_STOPPING, _PID = "stopping", "pid-"
"""Files in the folder: the number of the signal, and the beginning of the name of each process's own."""

_AGAIN, _SHORT_PATIENCE = 30.0, 10.0
"""Seconds: after which an alarm comes again, and that processes have after a second signal."""


def come_up(told: Path) -> int | None:
    """Lets the launcher know this process; returns the signal that it has had before, if any."""
    own = f"{_PID}{os.environ['RANK']}-"
    for earlier in told.glob(f"{own}*"):
        earlier.unlink()
    (told / f"{own}{os.getpid()}").touch()
    stopping = told / _STOPPING
    return int(stopping.read_text()) if stopping.exists() else None


def processes_told(told: Path) -> dict[int, int]:
    """The processes that have come up, as pids by their ranks."""
    names = [path.name.removeprefix(_PID).split("-") for path in told.glob(f"{_PID}*")]
    return {int(rank): int(pid) for rank, pid in names}


class SignalForwarder:
    """Hands signals on to the processes while the context lasts, and sets an alarm, at which the agent ends them.

    Args:
        told: the folder by which the processes are known.
        time_limit: seconds until the alarm; None for none.
        patience: seconds until it after a signal.

    Attributes:
        received: the first signal.
    """

    def __init__(self, told: Path, time_limit: float | None, patience: float) -> None:
        self._told = told
        self._time_limit = time_limit
        self._patience = patience
        self._numbers = itertools.count()
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._timer = signal.getitimer(signal.ITIMER_REAL)
        # Until the agent takes it, which it does once the launchers have met, it does nothing; so it comes again.
        self._before = {signal.SIGALRM: signal.signal(signal.SIGALRM, lambda *_: None)}
        # What is ignored stays so: `nohup` means it.
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before |= {number: signal.signal(number, self._hand_on) for number in heard}
        if self._time_limit is not None:
            signal.setitimer(signal.ITIMER_REAL, self._time_limit, _AGAIN)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, *self._timer)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self, number: int, frame: object) -> None:
        is_first, self.received = self.received is None, self.received or signal.Signals(number)
        # First, so that a process which comes up now hears of it by the one or the other.
        # Another signal may interrupt this one between any two lines, and has a file of its own.
        unfinished = self._told / f"{_STOPPING}.{next(self._numbers)}"
        unfinished.write_text(str(number))
        unfinished.rename(self._told / _STOPPING)
        processes = processes_told(self._told).values()
        if not processes:
            end_server()
            raise SignalException("no process has started yet", signal.Signals(number))
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, number)
        left = signal.getitimer(signal.ITIMER_REAL)[0] or self._patience
        signal.setitimer(signal.ITIMER_REAL, min(left, self._patience if is_first else _SHORT_PATIENCE), _AGAIN)

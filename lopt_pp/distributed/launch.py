"""Starts the processes of a run on this machine, starts them again after a failure, and says how they ended.

The work is done by torch's elastic agent, as torchrun does it, with our rendezvous. What torchrun prints of itself is
left out: a user reads what the run says, and nothing of the agent. Where `srun` has started one task for each process,
each task has a launcher of its own (see `lopt_pp.distributed.slurm`), and the launchers meet.

Processes are forked from one that has imported `preload` already, so that many of them read the libraries once.
"""

import faulthandler
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, launch_agent
from tqdm import tqdm

from lopt_pp.distributed import deaths
from lopt_pp.distributed.fork_server import TRAINER, leave_server, prepare_server
from lopt_pp.distributed.rendezvous import Rendezvous
from lopt_pp.distributed.signals import SignalForwarder, come_up
from lopt_pp.distributed.store import LOOPBACK
from lopt_pp.errors import LoptError
from lopt_pp.util.process import STOPPED_STATUS

_BACKEND = "lopt-pp-launch"

_LONGEST_END = 600
"""Seconds in which a process that is asked to end does so in good order; afterwards it is ended."""


@dataclass(frozen=True)
class Launchers:
    """The launchers of a run, and this one among them. Each starts as many processes.

    Attributes:
        processes: that each of them starts.
        number: how many there are.
        rank: of this one.
        host: address where they meet; the one with rank 0 listens there.
        port: of that; 0 for any that is free, where there is one launcher.
        environment: what its processes have in their environment besides.
    """

    processes: int
    number: int = 1
    rank: int = 0
    host: str = LOOPBACK
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> range:
        """Of the processes that this launcher starts."""
        return range(self.rank * self.processes, (self.rank + 1) * self.processes)

    def meeting(self, run_id: str = "lopt-pp", timeout: timedelta = timedelta(minutes=15)) -> "Meeting":
        """Where they meet; whoever holds it keeps the store of the run."""
        return Meeting(self.host, self.port, self.number, run_id, timeout, self.rank)


class Meeting(Rendezvous):
    """A rendezvous that the agent is given as it is, and does not make by the name that torchrun knows.

    Attributes:
        running: the processes, when the agent last saw that all of them run.
        seen: when that was (`time.monotonic`).
    """

    running: Sequence[BaseProcess] = ()
    seen = 0.0

    def get_backend(self) -> str:
        return _BACKEND

    def num_nodes_waiting(self) -> int:
        """See `Rendezvous`. The agent asks whenever it has seen that all processes run."""
        self.running, self.seen = multiprocessing.active_children(), time.monotonic()
        return super().num_nodes_waiting()


@dataclass(frozen=True)
class Outcome:
    """How the processes of a launcher ended.

    Attributes:
        statuses: what each process returned, by rank; None of one that ended before it could.
        failed: exit status of the process that failed first, by its rank; negative where a signal ended it, 255 where
            nobody knows it, since the fork server has gone.
        stopped_by: the signal that the launcher got.
    """

    statuses: Mapping[int, int | None]
    failed: Mapping[int, int] = field(default_factory=dict)
    stopped_by: signal.Signals | None = None

    @property
    def has_lost_server(self) -> bool:
        """Whether the fork server has gone; the processes are asked to stop then, and may have done so."""
        return deaths.SERVER_GONE in self.failed.values()

    @property
    def status(self) -> int:
        """Of the run, for the shell: 0 after its end, 75 where it was stopped and can go on."""
        if (not self.failed or self.has_lost_server) and None not in self.statuses.values():
            return max(status for status in self.statuses.values() if status is not None)
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        if self.has_lost_server:
            return 1
        return next((128 - status if status < 0 else status for status in self.failed.values()), 1)

    def silent_death(self) -> str:
        """Which process was ended by a signal, in words, since it could not say so itself; empty if none was."""
        return deaths.in_words(self.failed)


def launch(
    entry: str,
    arguments: Sequence[str],
    launchers: Launchers,
    *,
    rendezvous: Meeting | None = None,
    max_restarts: int = 0,
    logs: Path | None = None,
    time_limit: float | None = None,
    shutdown_seconds: int = _LONGEST_END,
    start_method: Literal["forkserver", "spawn"] = "forkserver",
    preload: Sequence[str] = TRAINER,
) -> Outcome:
    """Runs a function in new processes, and waits for their end. Only in the main thread, which alone hears signals.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 go to the processes, which are given time to end in good order. Where one fails
    the others are ended. Afterwards none is left.

    Args:
        entry: `module:function`; takes the arguments and returns an exit status. It finds `RANK`, `WORLD_SIZE`,
            `LOCAL_RANK` and so on in its environment, as torchrun sets them.
        arguments: of the function, in all processes the same.
        launchers: which processes this one starts.
        rendezvous: `launchers.meeting()`, where the caller keeps it; by default it ends with this function.
        max_restarts: how often all are started again after one has failed.
        logs: a folder for `rank-N.log`, with what each process prints; None leaves that to this process's own output.
        time_limit: seconds, after which the processes are ended (`Outcome.stopped_by` is SIGALRM), having printed
            where they were.
        shutdown_seconds: for the end in good order; TORCH_ELASTIC_SHUTDOWN_TIMEOUT goes before it.
        start_method: `spawn` has each process import everything for itself.
        preload: modules that the processes have imported when they start.

    Raises:
        LoptError: the launchers cannot meet.
    """
    patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", shutdown_seconds))
    prepare_server(launchers.processes, preload)
    _make_known()
    failed: dict[int, int] = {}
    meeting = rendezvous or launchers.meeting()
    with (
        tempfile.TemporaryDirectory(prefix="lopt-pp-") as told,
        SignalForwarder(Path(told), time_limit, patience) as signals,
        _silent_agent(),
    ):
        config = LaunchConfig(
            min_nodes=launchers.number,
            max_nodes=launchers.number,
            nproc_per_node=launchers.processes,
            run_id="lopt-pp",
            rdzv_backend=_BACKEND,
            rdzv_configs={"handler": meeting},
            max_restarts=max_restarts,
            monitor_interval=0.05,
            start_method=start_method,
            logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            # At its own signals the agent ends the processes, and does not hear how they ended.
            signals_to_handle="SIGALRM",
        )
        start = _Start(entry, tuple(arguments), Path(told), logs, dict(launchers.environment))
        try:
            launch_agent(config, run_rank, [start])
        except ChildFailedError as error:
            seconds, known = time.monotonic() - meeting.seen, deaths.exit_statuses(meeting.running, Path(told))
            failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
            failed = deaths.first_deaths(failed, known, seconds)
            if deaths.SERVER_GONE in failed.values():
                deaths.await_end(Path(told), patience)
        except SignalException as error:
            signals.received = signals.received or signal.Signals(error.sigval)
        except RendezvousError as error:
            raise LoptError(str(error)) from error
        finally:
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
        return Outcome({rank: start.status_of(rank) for rank in launchers.ranks}, failed, signals.received)


@dataclass(frozen=True)
class _Start:
    """What a new process is told."""

    entry: str
    arguments: tuple[str, ...]
    told: Path
    logs: Path | None
    environment: dict[str, str]

    def status_of(self, rank: int) -> int | None:
        path = self.told / str(rank)
        return int(path.read_text()) if path.exists() else None


def run_rank(start: _Start) -> int:
    """What a new process does. Its status is 0 for the agent where the run was stopped in good order, since the agent
    takes all others for failures."""
    # Of the keyboard's signals it shall get those that the launcher hands on, and each once.
    os.setsid()
    server = os.getppid()
    leave_server()
    if (number := come_up(start.told)) is not None:
        sys.exit(128 + number)
    is_over = threading.Event()
    threading.Thread(target=_end_after_launcher, args=[is_over], daemon=True).start()
    if start.logs is not None:
        with (start.logs / f"rank-{os.environ['RANK']}.log").open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.register(signal.SIGALRM, chain=True)
    # Its own lock is one between processes, which is left over where a process is killed.
    tqdm.set_lock(threading.RLock())
    os.environ.update(start.environment)
    # By it a run knows that its launcher takes the status 75 for a failure.
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    module, function = start.entry.split(":")
    try:
        entry: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
        status = entry(list(start.arguments))
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:  # A reader that is gone, or a full disk, makes no failure of a run that is done.
            sys.stdout = None
    is_over.set()
    (start.told / os.environ["RANK"]).write_text(str(status))
    # Without the server, nobody hears that this process has returned, which waits to be told that it may go.
    if status not in (0, STOPPED_STATUS) or os.getppid() != server:
        sys.exit(status)
    return status


def _end_after_launcher(is_over: threading.Event) -> None:
    """Ends this process where its launcher was killed, which would have to tell it that it may go.

    Args:
        is_over: set once its work is done; before, it may end in good order.
    """
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    if not is_over.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
        is_over.wait(_LONGEST_END)
    os._exit(1)


@cache
def _make_known() -> None:
    """Lets the agent take the rendezvous that it is given."""
    rendezvous_handler_registry.register(_BACKEND, lambda parameters: parameters.get("handler"))


@contextmanager
def _silent_agent() -> Iterator[None]:
    """The agent's modules log each at a level of its own: which process it ends, and tracebacks of itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)

"""Notices, whatever this process is doing, that the run cannot go on, and ends it with one clear line.

Three things can happen, and a thread waits for each: a neighbour dies (a connection on which nothing is sent until the
run is over breaks at that moment), another process says in the store why it failed, or a signal comes.

SIGTERM, SIGINT, SIGUSR1 (which Slurm can send ahead of a time limit) and SIGHUP (of a terminal that is closed; not
where it is ignored, as by `nohup`) ask the run to stop in good order. After a SIGINT, another one ends this process at
once; so does SIGTERM then, which is what torchrun makes of a second Ctrl-C. Python lets the main thread alone take
signals: in another one they are left to whoever has the main thread.

Where there are several processes this one ends without winding Python down: threads may be deep in waits that nothing
will end any more, and could abort it.
"""

import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import NoReturn, Self

import torch
import torch.distributed as dist

from lopt_pp.config.topology import Topology
from lopt_pp.distributed.transport_errors import cause_of, is_transport_error, peer_is_gone
from lopt_pp.distributed.world import Failure, World
from lopt_pp.errors import StreamError
from lopt_pp.util.console import print_error

_FOREVER = timedelta(days=3650)
_TAG_GOODBYE = 2
_PATIENCE = 3.0
"""Seconds in which a process that has died is noticed by those who watch its connections."""


class Watchdog:
    """Watches over a run, from when the processes have found each other, while the context lasts.

    Args:
        world: this process.
        topology: of the run.

    Attributes:
        abandon: called, from whatever thread it may be, before a failure ends this process; there to save or remove
            what is in the output directory.
        stop: called in a thread when a signal asks the run to stop; whether it will. Otherwise the process ends.
    """

    def __init__(self, world: World, topology: Topology) -> None:
        self.abandon: Callable[[Failure], None] = lambda failure: None
        self.stop: Callable[[signal.Signals], bool] = lambda number: False
        self._world = world
        self._topology = topology
        self._name = topology.name_of(world.rank)
        self._neighbours = [rank for rank in (world.rank - 1, world.rank + 1) if 0 <= rank < world.size]
        self._fate = threading.Lock()
        """Held by whoever decides how this process ends; a thread that ends it never lets go."""
        self._over = False
        self._told = threading.Event()
        self._handlers: dict[signal.Signals, object] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._world.size > 1:
            self._start(self._watch_store, self._world.connection())
        for rank in self._neighbours:
            goodbye = torch.empty(1, dtype=torch.int64)
            work = dist.irecv(goodbye, rank, tag=_TAG_GOODBYE)
            assert work is not None
            self._start(self._watch_neighbour, work, goodbye, rank)
        if threading.current_thread() is threading.main_thread():
            self._take_signals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, dist.DistNetworkError | dist.DistStoreError) and self._world.size > 1:
            self.fail(self._without_store())
        if error is not None and self._world.size > 1:
            if is_transport_error(error):
                # It does not say which process has gone, if one has. Whoever watches that one's connection does.
                self._told.wait(_PATIENCE if peer_is_gone(error) else 0.0)
                self.fail(f"{self._name}: a message to or from another process failed: {cause_of(error)}")
            self._release()
            traceback.print_exception(error)
            self._stop(f"{self._name}: {type(error).__name__}: {cause_of(error)}")
        try:
            self._say_goodbye()
        except StreamError as failure:
            self.fail(str(failure))
        self._release()
        self._leave_signals()
        self._world.end_waiting()
        # A thread that still ran while Python winds down could abort the process.
        for thread in self._threads:
            thread.join()

    def _take_signals(self) -> None:
        # Python runs handlers in the main thread, which may be deep in a wait; the wake-up socket reaches a thread.
        self._wake, woken = socket.socketpair()
        self._wake.setblocking(False)
        self._wake_before = signal.set_wakeup_fd(self._wake.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._handlers[number] = signal.signal(number, lambda *_: None)
        self._start(self._watch_signals, woken)

    def _leave_signals(self) -> None:
        """Leaves signals to whoever took them before."""
        if not self._handlers:
            return
        signal.set_wakeup_fd(self._wake_before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._wake.close()

    def fail(self, message: str, keep: bool = False) -> None:
        """Ends this process, and the others with it, because the run cannot go on; returns where there are no others.

        Args:
            message: for the user, who sees that of the process which failed first.
            keep: whether the weights of all stages are good and worth writing out.
        """
        self._release()
        self._stop(message, keep)

    def _release(self) -> None:
        """Leaves it to the caller, from here on, how this process ends."""
        with self._fate:
            self._over = True
        self._told.set()

    def _say_goodbye(self) -> None:
        for rank in self._neighbours:
            try:
                dist.send(torch.zeros(1, dtype=torch.int64), rank, tag=_TAG_GOODBYE)
            except RuntimeError as failure:
                raise StreamError(self._lost(rank, failure)) from failure

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _watch_neighbour(self, work: dist.Work, goodbye: torch.Tensor, rank: int) -> None:
        """Waits for a neighbour's goodbye. The thread holds the buffer that it arrives in."""
        try:
            work.wait(_FOREVER)
        except RuntimeError as failure:
            with self._fate:
                if not self._over:
                    self._stop(self._lost(rank, failure))

    def _lost(self, rank: int, failure: RuntimeError) -> str:
        name, cause = self._topology.name_of(rank), cause_of(failure)
        if peer_is_gone(failure):
            return f"{name} has died or lost its network ({cause}); {self._name} stops"
        return f"{self._name} lost its connection to {name}: {cause}"

    def _watch_store(self, store: dist.Store) -> None:
        try:
            failure = self._world.await_failure(store)
        except RuntimeError:
            with self._fate:
                if not self._over:
                    self._stop(self._without_store())
            return
        if failure is not None and failure.rank != self._world.rank:
            with self._fate:
                if not self._over:
                    self._end(failure)

    def _without_store(self) -> str:
        holder = self._world.store_rank
        who = "the launcher" if holder is None else self._topology.name_of(holder)
        return f"{who}, which holds the run's store, has died or lost its network; {self._name} stops"

    def _watch_signals(self, woken: socket.socket) -> None:
        interrupted = False
        with woken:
            while received := woken.recv(1):
                number = signal.Signals(received[0])
                if number not in self._handlers:
                    continue
                at_once = interrupted and number in (signal.SIGINT, signal.SIGTERM)
                interrupted = interrupted or number == signal.SIGINT
                if at_once:
                    self._leave(number)
                # The launcher ends the others when a process has died: then say which, not that a signal came.
                told = self._told.wait(1.0 if number == signal.SIGTERM else 0.0)
                if not told and not self.stop(number):
                    with self._fate:
                        if not self._over:
                            self._leave(number)

    def _leave(self, number: signal.Signals) -> NoReturn:
        print_error(message := f"{self._name} was ended by {number.name}")
        # What is half-written is removed, unless the disk hangs.
        failure = Failure(self._world.rank, message, keep=False)
        self._start(self.abandon, failure)
        self._threads[-1].join(1.0)
        os._exit(128 + number)

    def _stop(self, message: str, keep: bool = False) -> None:
        """Tells all others, tells the user unless another has a reason that came first, and ends this process."""
        self._told.set()
        failure = self._world.fail(message, keep)
        # Of the only process, the caller says it: `fail` returns to it.
        if failure.rank == self._world.rank and self._world.size > 1:
            print_error(failure.message)
        self._end(failure)

    def _end(self, failure: Failure) -> None:
        """Ends this process; where it is the only one, its caller does."""
        self._told.set()
        self.abandon(failure)
        if self._world.size > 1:
            self._world.leave()
            os._exit(1)

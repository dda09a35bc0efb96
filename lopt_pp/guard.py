"""Notices, whatever the training loop is doing, that the run cannot go on, and ends this process with one clear line.

Three things can happen, and a thread waits for each: a neighbour dies (a connection on which nothing is sent until the
run is over breaks at that moment), another process says in the store why it failed, or the launcher sends a signal.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from lopt_pp.distributed import Failure, World
from lopt_pp.stream import Boundary, StreamError

_FOREVER = timedelta(days=3650)
_TAG_GOODBYE = 2


def complain(message: str) -> None:
    """Tells the user why the program stops: one line on standard error."""
    print(f"lopt-pp: error: {message}", file=sys.stderr, flush=True)


class Guard:
    """Watches over a run while the context lasts.

    Args:
        world: this process.
        boundaries: that it stands at, by the stage that sends.
        name: of this process in messages, such as "stage 0 (rank 0)".
        keep: writes out the weights that this process has; called, from a thread, when another process has failed in a
            way that leaves them good.
    """

    def __init__(
        self, world: World, boundaries: Mapping[int, Boundary], name: str, keep: Callable[[Failure], None]
    ) -> None:
        self._world = world
        self._name = name
        self._keep = keep
        self._neighbours = [
            (b.target, b.stage + 1, b.headers) if b.source == world.rank else (b.source, b.stage, b.headers)
            for b in boundaries.values()
        ]
        self._fate = threading.Lock()
        """Held by whoever decides how this process ends; a thread that ends it never lets go."""
        self._over = False
        self._told = threading.Event()
        self._handlers: dict[signal.Signals, object] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self._world.size > 1:
            self._start(self._watch_store, self._world.connection(_FOREVER))
        for rank, stage, group in self._neighbours:
            goodbye = torch.empty(1, dtype=torch.int64)
            work = dist.irecv(goodbye, rank, group, tag=_TAG_GOODBYE)
            assert work is not None
            self._start(self._watch_neighbour, work, goodbye, rank, stage)
        # Python runs handlers in the main thread, which may be deep in a wait; the wake-up socket reaches a thread.
        self._wake, woken = socket.socketpair()
        self._wake.setblocking(False)
        self._wake_before = signal.set_wakeup_fd(self._wake.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, lambda *_: None)
        self._start(self._watch_signals, woken)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._say_goodbye()
        finally:
            self.release()
            signal.set_wakeup_fd(self._wake_before)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._wake.close()
            if error is not None:
                # The others learn the reason before they see the connection break.
                self._world.fail(str(error) or type(error).__name__)
                for _, _, group in self._neighbours:
                    group.abort()
            self._world.end_waiting()
            # A thread that still ran while Python winds down could abort the process.
            for thread in self._threads:
                thread.join()

    def release(self) -> None:
        """Leaves it to the caller, from here on, how this process ends."""
        with self._fate:
            self._over = True
        self._told.set()

    def _say_goodbye(self) -> None:
        for rank, stage, group in self._neighbours:
            try:
                dist.send(torch.zeros(1, dtype=torch.int64), rank, group, tag=_TAG_GOODBYE)
            except RuntimeError as failure:
                raise StreamError(f"stage {stage} (rank {rank}) has died or lost its network at the end") from failure

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _watch_neighbour(self, work: dist.Work, goodbye: torch.Tensor, rank: int, stage: int) -> None:
        try:
            work.wait(_FOREVER)
        except RuntimeError:
            with self._fate:
                if not self._over:
                    self._stop(f"stage {stage} (rank {rank}) has died or lost its network; {self._name} stops")

    def _watch_store(self, store: dist.Store) -> None:
        try:
            failure = self._world.await_failure(store)
        except RuntimeError:
            with self._fate:
                if not self._over:
                    self._stop(f"the launcher that holds the run's store is gone; {self._name} stops")
            return
        if failure is not None and failure.rank != self._world.rank:
            with self._fate:
                if not self._over:
                    self._leave(failure)

    def _watch_signals(self, woken: socket.socket) -> None:
        with woken:
            while received := woken.recv(1):
                number = signal.Signals(received[0])
                # The launcher ends the others when a process has died: then say which, not that a signal came.
                if number in self._handlers and not self._told.wait(timeout=1.0):
                    with self._fate:
                        if not self._over:
                            complain(f"{self._name} was stopped by {number.name}")
                            os._exit(128 + number)

    def _stop(self, message: str) -> None:
        """Ends this process, with a message unless another process has told the reason already."""
        self._told.set()
        try:
            failure = self._world.fail(message)
        except RuntimeError:
            failure = Failure(self._world.rank, message, keep=False)
        if failure.rank == self._world.rank:
            complain(failure.message)
            os._exit(1)
        # A neighbour that failed with a reason told it before it left; that reason stands.
        self._leave(failure)

    def _leave(self, failure: Failure) -> None:
        """Ends this process because of what another one has told."""
        self._told.set()
        if failure.keep:
            self._keep(failure)
        os._exit(1)

"""Notices, whatever the training loop is doing, that the run cannot go on, and ends this process with one clear line.

Three things can happen, and a thread waits for each: a neighbour dies (a connection on which nothing is sent until the run
is over breaks at that moment), another process says in the store why it failed, or a signal comes from the launcher.
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
from lopt_pp.stream import Boundary

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
        keep: writes out the weights that this process has; called, from a thread, when another process has failed in a way
            that leaves them good.
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
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if self._world.size > 1:
            self._start(self._watch_store, self._world.connection(_FOREVER))
        for rank, stage, group in self._neighbours:
            goodbye = torch.empty(1, dtype=torch.int64)
            work = dist.irecv(goodbye, rank, group, tag=_TAG_GOODBYE)
            self._start(self._watch_neighbour, work, goodbye, rank, stage)
        # Python runs handlers in the main thread, which may be deep in a wait; the wake-up socket reaches a thread at once.
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
        self._ended.set()
        signal.set_wakeup_fd(self._wake_before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._wake.close()
        if kind is None:
            for rank, _, group in self._neighbours:
                dist.isend(torch.zeros(1, dtype=torch.int64), rank, group, tag=_TAG_GOODBYE).wait()

    def stopping(self) -> None:
        """This process is about to end by itself; a signal from the launcher no longer ends it before it is done."""
        self._stopping.set()

    @staticmethod
    def _start(target: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def _watch_neighbour(self, work: dist.Work, goodbye: torch.Tensor, rank: int, stage: int) -> None:
        try:
            work.wait(_FOREVER)
        except RuntimeError:
            # A neighbour that failed with a reason has told it before it left; then that reason stands.
            if not self._ended.is_set():
                self._stop(f"stage {stage} (rank {rank}) has died or lost its network; {self._name} stops")

    def _watch_store(self, store: dist.Store) -> None:
        try:
            failure = Failure.await_from(store)
        except RuntimeError:
            if not self._ended.is_set():
                self._stop(f"the launcher that holds the run's store is gone; {self._name} stops")
            return
        if failure.rank != self._world.rank and not self._ended.is_set():
            self._leave(failure)

    def _watch_signals(self, woken: socket.socket) -> None:
        while received := woken.recv(1):
            number = signal.Signals(received[0])
            if number in self._handlers:
                # The launcher ends the others when one process has died: then say which, not that a signal came.
                if not self._stopping.wait(timeout=1.0):
                    complain(f"{self._name} was stopped by {number.name}")
                    os._exit(128 + number)
                return

    def _stop(self, message: str) -> None:
        """Ends this process, with a message unless another process has told the reason already."""
        self._stopping.set()
        try:
            failure = self._world.fail(message)
        except RuntimeError:
            failure = Failure(self._world.rank, message, keep=False)
        if failure.rank == self._world.rank:
            complain(failure.message)
            os._exit(1)
        self._leave(failure)

    def _leave(self, failure: Failure) -> None:
        """Ends this process because of what another one has told."""
        self._stopping.set()
        if failure.keep:
            self._keep(failure)
        os._exit(1)

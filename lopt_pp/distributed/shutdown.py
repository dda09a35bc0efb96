"""Which steps a run makes: all of them, or those until somebody asks it to stop.

Every stage must stop after the same step, and none may wait for another to find out which. So the first stage decides,
step by step, before it announces a step's first message; the others learn it from the stream, where the end comes in
place of that message. Replicas of the first stage agree, but only once a stop is asked for.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch.distributed import Store

from lopt_pp.distributed.world import World
from lopt_pp.util.threads import in_background

_KEY = "stop"
_NEVER = "never"


class StopSignal(Protocol):
    """Tells a process which steps are made, before somebody has asked the run to stop."""

    def is_decided(self, step: int) -> bool:
        """Whether `runs(step)` answers without waiting for another process."""

    def runs(self, step: int) -> bool:
        """Whether the step, counted from 0, is made. Asked in order; what has been answered stays so."""


class NeverStops:
    """Every step is made."""

    def is_decided(self, step: int) -> bool:
        return True

    def runs(self, step: int) -> bool:
        return True


NEVER_STOPS = NeverStops()


def ask_to_stop(store: Store, reason: str) -> None:
    """Asks the run, from any of its processes and threads, to end as soon as the step at hand is done.

    Args:
        store: of the run.
        reason: one word, such as the name of a signal; that of who asks first is kept.
    """
    store.compare_set(_KEY, "", reason)


def stop_reason(store: Store) -> str:
    """Why the run was asked to stop. Only once it was."""
    return store.get(_KEY).decode()


class StopCoordinator:
    """The stop signal of the processes that decide: those with the first stage, or all of an end-to-end pipeline.

    Until a stop is asked for they decide every step at once, each for itself. Then each tells the first step that it
    has not decided yet, and the run ends before the last of these. What the others need in order to come so far has
    been decided by all of them.

    Args:
        store: a connection to the run's store for the thread that waits for a request, with a long timeout.
        rank: of this process.
        deciders: ranks of all processes that decide.
        first_step: the first that a stop may come before; an evaluation before it (`START`) is always made.
    """

    def __init__(self, store: Store, rank: int, deciders: Sequence[int], first_step: int) -> None:
        self._store = store
        self._rank = rank
        self._deciders = deciders
        self._undecided = first_step
        self._end: int | None = None
        self._agreeing = False
        self._changed = threading.Condition()
        self._thread = in_background(self._await_request)

    def is_decided(self, step: int) -> bool:
        return True

    def runs(self, step: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: step < self._undecided or not self._agreeing)
            if self._end is not None:
                return step < self._end
            self._undecided = max(self._undecided, step + 1)
            return True

    def close(self, store: Store) -> None:
        """Ends the waiting for a request: all steps are made.

        Args:
            store: another connection than the thread's.
        """
        ask_to_stop(store, _NEVER)
        self._thread.join()

    def _await_request(self) -> None:
        if self._store.get(_KEY).decode() == _NEVER:
            return
        with self._changed:
            self._agreeing, own = True, self._undecided
        self._store.set(f"{_KEY}/{self._rank}", str(own))
        end = max(int(self._store.get(f"{_KEY}/{rank}")) for rank in self._deciders)
        with self._changed:
            self._end, self._agreeing = end, False
            self._changed.notify_all()


@contextmanager
def stop_coordinator(world: World, deciders: Sequence[int], first_step: int) -> Iterator[StopCoordinator | None]:
    """The stop signal of this process where it is one of those that decide, for as long as the run trains.

    Args:
        world: this process.
        deciders: ranks of all processes that decide.
        first_step: the first that a stop may come before.

    Returns:
        A context; its value is None in the processes that the stream tells.
    """
    if world.rank not in deciders:
        yield None
        return
    coordinator = StopCoordinator(world.connection(), world.rank, deciders, first_step)
    try:
        yield coordinator
    except BaseException:
        if world.size == 1:  # Where there are more, this process ends without waiting for its threads.
            coordinator.close(world.store)
        raise
    coordinator.close(world.store)

"""Which steps a run makes: all of them, or those until somebody asks it to stop or to finish; and what it does besides.

Every stage must stop after the same step, and none may wait for another to find out which. So the first stage decides,
step by step, before it announces a step's first message; the others learn it from the stream, where the end comes in
place of that message. Replicas of the first stage agree, but only once a stop is asked for.

A run that is asked to stop ends as soon as it can, and goes on later from its checkpoint. One that is asked to finish
makes one step more, which nobody has begun yet: its last, with all that a last step has, the evaluation among it. The
others learn which it is from the header of its first message.

It may also be asked, any number of times, to evaluate or to save. That is done after the next step that nobody has
begun, in the same way: those who decide agree on the step, and its first header tells the others. Each process that
decides takes the requests in order, by their numbers.

An evaluation changes no weights, so it ends early where it can: it is decided on microbatch by microbatch. `step` and
`held_out` say what is decided on: the training of a step (`held_out` 0), or a microbatch of the evaluation after it
(from 1). They are made, and asked for, in this order.
"""

import itertools
import json
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch.distributed import Store

from lopt_pp.distributed.world import World
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)

_KEY, _END = "stop", "stop/end"
_STOP, _FINISH, _NEVER = "stop", "finish", "never"
"""How a run may be asked to end; the last by the run itself, once it has made all its steps."""

_REQUEST = "request"
"""Before the number of each request: to end, or for an evaluation or a checkpoint."""

EVALUATE, SAVE = 1, 2
"""What a run may be asked to do after a step; both are their sum."""


class RunLength:
    """How many steps a run makes: as many as were planned, or fewer where it finishes early.

    A process knows that a step is the last before it begins it; so what is asked here about a step that the process
    makes, or has made, is answered for good.

    Args:
        planned: steps, those before a resume included.

    Attributes:
        planned: likewise.
        num_steps: that the run makes, as far as it is decided.
    """

    def __init__(self, planned: int) -> None:
        self.planned = self.num_steps = planned
        self._besides: dict[int, int] = {}
        """By step, what it was asked to do after it."""

    @property
    def is_early(self) -> bool:
        """Whether the run finishes before it has made all steps that were planned."""
        return self.num_steps < self.planned

    def is_last(self, steps_done: int) -> bool:
        """Whether the run is finished when so many steps are done."""
        return steps_done == self.num_steps

    def finish_after(self, steps_done: int) -> None:
        """Has the run finish when so many steps are done, and not later. For whoever decides it, or is told."""
        self.num_steps = min(self.num_steps, steps_done)

    def do_after(self, step: int, what: int) -> None:
        """Has the run evaluate or save after a step, whatever its flags say. For whoever decides it, or is told.

        Args:
            step: from 0, that this process has not begun.
            what: `EVALUATE`, `SAVE` or their sum.
        """
        if what:
            self._besides[step] = self._besides.get(step, 0) | what

    def besides(self, step: int) -> int:
        """What is done after a step, from 0, besides what flags say; 0 for nothing."""
        return self._besides.get(step, 0)


class StopSignal(Protocol):
    """Tells a process what is made, before somebody has asked the run to stop."""

    def is_decided(self, step: int, held_out: int = 0) -> bool:
        """Whether `runs` answers without waiting for another process."""

    def runs(self, step: int, held_out: int = 0) -> bool:
        """Whether the step, counted from 0, or the held-out microbatch after it is made. Asked in order; what has been
        answered stays so."""


class NeverStops:
    """Everything is made."""

    def is_decided(self, step: int, held_out: int = 0) -> bool:
        return True

    def runs(self, step: int, held_out: int = 0) -> bool:
        return True


NEVER_STOPS = NeverStops()


def ask_to_stop(store: Store, reason: str) -> bool:
    """Asks the run, from any of its processes and threads, to end as soon as the steps are done that have begun.

    It can go on later from the checkpoint that it saves then.

    Args:
        store: of the run.
        reason: one word, such as the name of a signal. Of all requests to stop or to finish the first one counts.

    Returns:
        Whether this is the first request for this reason: a launcher hands a signal on to all processes, and one line
        that says so is enough.
    """
    _ask(store, _STOP, reason)
    return store.add(f"{_KEY}/{reason}", 1) == 1


def ask_to_finish(store: Store, reason: str) -> None:
    """Asks the run, from any of its processes and threads, to finish early, as if fewer steps had been planned.

    It makes the next step that no process has begun, evaluates, and leaves its model; started again, it is finished.
    Does nothing in a run that makes its last step already.

    Args:
        store: of the run: in a thread of one's own, another `World.connection` than other threads have.
        reason: one line for the log and the model card, such as `eval_loss has not improved for 3 evaluations`. Of all
            requests to stop or to finish the first one counts.
    """
    _ask(store, _FINISH, reason)


def _ask(store: Store, what: str, reason: str) -> None:
    store.compare_set(_KEY, "", json.dumps([what, reason]))
    _put(store, None)


def ask_for(store: Store, what: int) -> None:
    """Asks the run, from any of its processes and threads, to evaluate or to save after the next step.

    That is the next one which no process has begun. Of a run that makes its last step already nothing is asked for: it
    does both then.

    Args:
        store: of the run: in a thread of one's own, another `World.connection` than other threads have.
        what: `EVALUATE`, `SAVE` or their sum.
    """
    _put(store, what)


def _put(store: Store, request: int | None) -> None:
    """Numbers a request; None is to end, as `_KEY` says."""
    store.set(f"{_REQUEST}/{store.add(_REQUEST, 1) - 1}", json.dumps(request))


def stop_reason(store: Store) -> str:
    """Why the run was asked to stop, or to finish. Only once it was."""
    _, reason = json.loads(store.get(_KEY))
    return str(reason)


def await_end(store: Store) -> int | None:
    """Waits until it is decided where a run ends that was asked to stop or finish; None where it makes all its steps.

    Returns:
        The number of steps that the run has done then.
    """
    decided: int | None = json.loads(store.get(_END))
    return decided


class StopCoordinator:
    """The stop signal of the processes that decide: those with the first stage, or all of an end-to-end pipeline.

    Until a stop is asked for they decide everything at once, each for itself. Then each tells how far it has decided,
    and the run ends where the farthest is. What the others need in order to come so far has been decided by all.

    Args:
        store: a connection to the run's store for the thread that waits for a request, with a long timeout.
        rank: of this process.
        deciders: ranks of all processes that decide.
        first_step: the first that a stop may come before.
        length: of the run; is told where the run finishes early.
    """

    def __init__(
        self, store: Store, rank: int, deciders: Sequence[int], first_step: int, length: RunLength | None = None
    ) -> None:
        self._length = length or RunLength(sys.maxsize)
        self._store = store
        self._rank = rank
        self._deciders = deciders
        self._decided = (first_step - 1, 0)
        """What is made for sure, up to and with this step and `held_out`."""
        self._is_last = False
        """Whether nothing is made after what is decided."""
        self._agreeing = False
        self._changed = threading.Condition()
        self._thread = in_background(self._await_requests)

    def is_decided(self, step: int, held_out: int = 0) -> bool:
        return True

    def runs(self, step: int, held_out: int = 0) -> bool:
        place = step, held_out
        with self._changed:
            self._changed.wait_for(lambda: place <= self._decided or not self._agreeing)
            if not self._is_last:
                self._decided = max(self._decided, place)
            return place <= self._decided

    def close(self, store: Store) -> None:
        """Ends the waiting for a request: all steps are made.

        Args:
            store: another connection than the thread's.
        """
        _ask(store, _NEVER, "")
        self._thread.join()

    def _farthest(self, number: int) -> tuple[int, int]:
        """How far the farthest of those who decide has decided. From then on none decides more, until it is agreed."""
        with self._changed:
            self._agreeing, own = True, self._decided
        self._store.set(f"{_REQUEST}/{number}/{self._rank}", json.dumps(own))
        step, held_out = max(json.loads(self._store.get(f"{_REQUEST}/{number}/{rank}")) for rank in self._deciders)
        return step, held_out

    def _await_requests(self) -> None:
        for number in itertools.count():
            request = json.loads(self._store.get(f"{_REQUEST}/{number}"))
            if request is None:
                self._end(number)
                return
            step, _ = self._farthest(number)
            with self._changed:
                self._length.do_after(step + 1, request)
                self._agreeing = False
                self._changed.notify_all()

    def _end(self, number: int) -> None:
        what, reason = json.loads(self._store.get(_KEY))
        if what == _NEVER:
            self._store.set(_END, json.dumps(None))
            return
        step, held_out = self._farthest(number)
        if what == _FINISH:
            # With the next step, which nobody has begun, and all of its evaluation.
            step, held_out = min(step + 1, self._length.planned - 1), sys.maxsize
            self._length.finish_after(step + 1)
            if self._length.is_early and self._rank == 0:
                logger.info("the run finishes early, after step %d of %d: %s", step + 1, self._length.planned, reason)
        with self._changed:
            self._decided, self._is_last, self._agreeing = (step, held_out), True, False
            self._changed.notify_all()
        self._store.set(_END, json.dumps(None if step + 1 == self._length.planned else step + 1))


@contextmanager
def stop_coordinator(
    world: World, deciders: Sequence[int], first_step: int, length: RunLength
) -> Iterator[StopCoordinator | None]:
    """The stop signal of this process where it is one of those that decide, for as long as the run trains.

    Args:
        world: this process.
        deciders: ranks of all processes that decide.
        first_step: the first that a stop may come before.
        length: of the run; is told where the run finishes early.

    Returns:
        A context; its value is None in the processes that the stream tells.
    """
    if world.rank not in deciders:
        yield None
        return
    coordinator = StopCoordinator(world.connection(), world.rank, deciders, first_step, length)
    try:
        yield coordinator
    except BaseException:
        if world.size == 1:  # Where there are more, this process ends without waiting for its threads.
            coordinator.close(world.store)
        raise
    coordinator.close(world.store)

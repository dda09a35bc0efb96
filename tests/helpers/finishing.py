"""Runs that are asked to finish early, however slow the thread is that asks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lopt_pp.distributed.shutdown import EVALUATE, SAVE, RunLength, StopCoordinator, ask_for, ask_to_finish
from lopt_pp.metrics.collector import Collector
from lopt_pp.training.checkpointing import Checkpointer


@contextmanager
def asking_to_finish(after: int) -> Iterator[None]:
    """Has a run's collector ask for an evaluation and a checkpoint, in its thread, when it has the records of a step.

    When it has those of that evaluation, it asks the run to finish. Rank 0 waits to be heard, each time.
    """
    keep, do_after, end, after_step = Collector._keep, RunLength.do_after, StopCoordinator._end, Checkpointer.after_step
    heard = [threading.Event(), threading.Event()]
    besides: list[int] = []

    def ask(collector: Collector, step: int, record: dict[str, Any]) -> None:
        if step == after:
            ask_for(collector._store, EVALUATE | SAVE)
        if "eval_loss" in record:
            ask_to_finish(collector._store, "that is enough")
        keep(collector, step, record)

    def hear(length: RunLength, step: int, what: int) -> None:
        do_after(length, step, what)
        if what:
            besides.append(step)
            heard[0].set()

    def hear_end(coordinator: StopCoordinator, number: int) -> None:
        end(coordinator, number)
        heard[1].set()

    def wait(checkpointer: Checkpointer, steps_done: int) -> None:
        after_step(checkpointer, steps_done)
        if checkpointer._committer is not None:
            assert steps_done != after + 3 or heard[0].wait(60)
            assert steps_done - 4 not in besides or heard[1].wait(60)

    with (
        mock.patch.object(Collector, "_keep", ask),
        mock.patch.object(RunLength, "do_after", hear),
        mock.patch.object(StopCoordinator, "_end", hear_end),
        mock.patch.object(Checkpointer, "after_step", wait),
    ):
        yield


@contextmanager
def waiting_to_be_heard(at: int) -> Iterator[None]:
    """Has rank 0 wait after a step until a request to finish is heard, and others with it that are not far ahead."""
    end, after_step, heard = StopCoordinator._end, Checkpointer.after_step, threading.Event()

    def hear(coordinator: StopCoordinator, number: int) -> None:
        end(coordinator, number)
        heard.set()

    def wait(checkpointer: Checkpointer, steps_done: int) -> None:
        after_step(checkpointer, steps_done)
        if steps_done == at and checkpointer._committer is not None:
            assert heard.wait(60)

    with (
        mock.patch.object(StopCoordinator, "_end", hear),
        mock.patch.object(Checkpointer, "after_step", wait),
    ):
        yield

"""Threads that take from the run's store or put into it, beside the training."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def in_background(target: Callable[..., None], *arguments: object) -> threading.Thread:
    """Starts `target` in a daemon thread.

    It ends without a word where the store is gone: `lopt_pp.distributed.watchdog` notices that too, says so and ends
    the process.
    """

    def run() -> None:
        with suppress(dist.DistError):
            target(*arguments)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def result_in_time(call: Callable[[], T], seconds: float) -> T:
    """What a call gives that may never return, made in a daemon thread.

    Raises:
        TimeoutError: it takes longer than `seconds`; the thread stays in it.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # It is the caller's.
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)

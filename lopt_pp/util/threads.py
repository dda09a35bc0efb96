"""Threads that take from the run's store or put into it, beside the training."""

import threading
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist


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

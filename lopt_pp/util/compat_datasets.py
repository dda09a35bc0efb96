"""What `datasets` needs around it, since it leaves no other way. `test_compat_datasets.py` tries it."""

import functools
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from datasets import Dataset

_forks_workers = False


@contextmanager
def signals_as_usual_in_workers() -> Iterator[None]:
    """Has the processes that are forked while this lasts, as `Dataset.map` does, take signals in the usual way.

    They would inherit this process's handling of SIGTERM, by which their pool ends them, with the socket that tells of
    signals: this process would take their end for its own.

    A hook of the interpreter: `Dataset.map` forks its processes itself and has no argument for what they do first.
    (What they are given to map comes too late: one that has had nothing to do yet is ended in the same way.) The hook
    stays from the first use on, since Python takes none back, and does nothing outside of this context. Seen in
    datasets 5.1 and 5.2.
    """
    global _forks_workers
    _install_hook()
    _forks_workers = True
    try:
        yield
    finally:
        _forks_workers = False


@functools.cache
def _install_hook() -> None:
    os.register_at_fork(after_in_child=_take_signals_as_usual)


def _take_signals_as_usual() -> None:
    if _forks_workers:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


def fingerprint(dataset: Dataset) -> str:
    """What `datasets` names the content of a data set by, with all that was done to it; it goes into its own caches.

    Private: the attribute `_fingerprint`. Two data sets of the same files may hold other rows of them (`select`), and
    nothing public tells them apart without reading all rows. Seen in datasets 5.1 and 5.2.
    """
    return str(dataset._fingerprint)

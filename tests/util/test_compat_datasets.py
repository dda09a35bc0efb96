"""What `datasets` needs around it still works.

A test that fails after an upgrade says that the library has changed there: the docstring of the item says what it is
for and what it reaches into.
"""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from lopt_pp.util import compat_datasets


@pytest.fixture
def handled() -> Iterator[None]:
    """A process that takes signals as the trainer does."""
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    before = signal.set_wakeup_fd(wake.fileno())
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.set_wakeup_fd(before)
    signal.signal(signal.SIGTERM, handler)
    wake.close()
    woken.close()


def _signals_in_workers(start: int) -> set[tuple[bool, bool]]:
    """Of each process that maps: whether SIGTERM ends it, and whether nobody is woken by a signal that it gets."""

    def look(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "ends": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
            "quiet": signal.set_wakeup_fd(-1) == -1,
        }

    mapped = Dataset.from_dict({"row": [start, start + 1]}).map(look, num_proc=2, load_from_cache_file=False)
    return set(zip(mapped["ends"], mapped["quiet"], strict=True))


def test_workers_of_datasets_take_signals_in_the_usual_way(
    handled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    assert _signals_in_workers(0) == {(False, False)}, "workers no longer inherit it: the hook may go"
    with compat_datasets.signals_as_usual_in_workers():
        assert _signals_in_workers(2) == {(True, True)}
    assert _signals_in_workers(4) == {(False, False)}
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL


def test_the_fingerprint_tells_what_was_taken_of_a_data_set() -> None:
    rows = Dataset.from_dict({"text": ["a", "b", "c"]})
    taken = {compat_datasets.fingerprint(rows.select(numbers)) for numbers in ([0, 1], [1, 2])}
    assert len(taken | {compat_datasets.fingerprint(rows)}) == 3
    assert compat_datasets.fingerprint(rows.select([1, 2])) in taken

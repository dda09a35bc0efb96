"""`state.json`: what a run is doing just now, or how it has ended, for pages that follow it.

Rank 0 keeps it, in a thread of its own: the training only says in passing what it does. Whether the run is alive, the
lock of the output directory tells (`lopt_pp.checkpoint.lock`), whose time of change is set every few seconds.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lopt_pp.util.files import write_text
from lopt_pp.util.process import Process, own_process

STATE_FILE = "state.json"

Activity = Literal["training", "evaluating", "saving"]
"""What a run does while it goes on."""

End = Literal["finished", "stopped", "failed"]
"""How a run has ended."""

_PAUSE = 1.0
"""Seconds between two writes: what lasts shorter than that need not be seen."""


@dataclass(frozen=True)
class RunState:
    """What `state.json` says.

    Attributes:
        state: what the run does, or how it has ended.
        since: when that began, in seconds since 1970 by the clock of rank 0.
        step: steps done then.
        reason: why the run was stopped, or has failed, as it was printed; empty otherwise.
        process: of rank 0.
    """

    state: Activity | End
    since: float
    step: int
    reason: str
    process: Process

    @property
    def is_end(self) -> bool:
        return self.state in get_args(End)


class StateFile:
    """`state.json` of a run that goes on. Training goes on where it cannot be written.

    Args:
        directory: the output directory.
        step: steps done so far.
        may_write: whether the directory is still this run's.
    """

    def __init__(self, directory: Path, step: int, may_write: Callable[[], bool] = lambda: True) -> None:
        self._path, self._may_write = directory / STATE_FILE, may_write
        self._process = own_process()
        self._now: tuple[Activity | End, int, float, str] = ("training", step, time.time(), "")
        self._written: object = None
        self._writing, self._looking = threading.Lock(), threading.Lock()
        self._is_followed = False
        self._ended = threading.Event()
        self._write()

    def set(self, activity: Activity, step: int) -> None:
        """Says what the run does from now on. It is written by a thread, which lasts as long as there are changes.

        Args:
            activity: likewise.
            step: steps done so far.
        """
        if activity == self._now[0]:  # Mostly.
            return
        with self._looking:
            if self._ended.is_set():
                return
            self._now = (activity, step, time.time(), "")
            if not self._is_followed:
                self._is_followed = True
                threading.Thread(target=self._follow, daemon=True).start()

    def end(self, end: End, step: int, reason: str = "") -> None:
        """Writes how the run has ended, at once; what comes first stays. May be called from any thread."""
        with self._looking:
            if self._ended.is_set():
                return
            self._ended.set()
            self._now = (end, step, time.time(), reason)
        self._write()

    def _follow(self) -> None:
        while True:
            self._write()
            if self._ended.wait(_PAUSE):
                return
            with self._looking:
                if self._now == self._written:
                    self._is_followed = False
                    return

    def _write(self) -> None:
        with self._writing:
            if (now := self._now) == self._written or not self._may_write():
                return
            state, step, since, reason = now
            content = asdict(RunState(state, round(since, 3), step, reason, self._process))
            with suppress(OSError):  # Of a full disk metrics.jsonl tells.
                write_text(self._path, json.dumps(content) + "\n")
                self._written = now


def read_state(directory: Path) -> RunState | None:
    """What the `state.json` of an output directory says; None where there is none, or it is not what a run writes."""
    try:
        content: dict[str, Any] = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
        state = RunState(**content | {"process": Process(**content["process"])})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    known = state.state in (*get_args(Activity), *get_args(End))
    is_whole = known and isinstance(state.since, int | float) and isinstance(state.reason, str)
    return state if is_whole and isinstance(state.step, int) else None

"""Follows the files of a run that goes on: what was read once is not read again."""

import os
from pathlib import Path
from typing import Any

from lopt_pp.errors import LoptError
from lopt_pp.metrics.records import FILE
from lopt_pp.report.run_data import Records, RunData, read_json
from lopt_pp.report.state import State, StateReader

_TAIL = 64
"""Bytes before the place where reading goes on that must be the same as before."""


class _LineFile:
    """Reads the lines that were added to a file since the last time; knows a file that was written anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._offset, self._tail = 0, 0, b""

    def read(self) -> tuple[bool, list[bytes]]:
        """Whether the file is another one than before, and its whole lines from there, or from its beginning, on."""
        try:
            with self._path.open("rb") as file:
                inode, size = (status := os.fstat(file.fileno())).st_ino, status.st_size
                is_new = inode != self._inode or size < self._offset
                if not is_new:
                    if size == self._offset:
                        return False, []
                    file.seek(self._offset - len(self._tail))
                    is_new = file.read(len(self._tail)) != self._tail
                if is_new:
                    self._inode, self._offset, self._tail = inode, 0, b""
                    file.seek(0)
                whole, end, _ = file.read().rpartition(b"\n")
        except OSError:
            is_new = self._offset > 0
            self._inode, self._offset, self._tail = 0, 0, b""
            return is_new, []
        self._offset += len(whole) + len(end)
        self._tail = (self._tail + whole + end)[-_TAIL:]
        return is_new, whole.split(b"\n") if end else []


class _JsonFile:
    """A file with a JSON object, read again when it has changed; empty where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: object = None
        self.content: dict[str, Any] = {}

    def read(self) -> bool:
        """Whether the content has changed."""
        try:
            status = self._path.stat()
            stamp: object = (status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return False
        before = self.content
        try:
            self.content = read_json(self._path)
        except LoptError:  # It is just being written.
            return False
        self._stamp = stamp
        return self.content != before


class Follower:
    """Follows a run by the files in its output directory, from before there is one.

    Args:
        directory: the output directory.

    Attributes:
        run: what is known of the run; None before its first step.
        state: what it is doing.
        about: `run.json`; empty where there is none.
        unreadable: lines of `metrics.jsonl` that are not records of a step.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run: RunData | None = None
        self.state: State | None = None
        self.unreadable = 0
        self._records = Records()
        self._metrics = _LineFile(directory / "metrics.jsonl")
        self._about, self._trace, self._stopped = (
            _JsonFile(directory / name) for name in (FILE, "trace.json", "stopped.json")
        )
        self._reader = StateReader(directory)

    @property
    def about(self) -> dict[str, Any]:
        return self._about.content

    def poll(self) -> bool:
        """Reads what is new; whether there is anything."""
        is_new, lines = self._metrics.read()
        if is_new:
            self._records, self.unreadable, self.run = Records(), 0, None
        for line in lines:
            try:
                self._records.add(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                self.unreadable += 1
        others = [file.read() for file in (self._about, self._trace, self._stopped)]
        changed = is_new or bool(lines) or any(others)
        if changed and self._records.is_whole:
            stopped = self._stopped.content or None
            self.run = self._records.run(self.directory, self.about, self._trace.content, stopped)
        before, self.state = self.state, self._reader.read(self.run)
        return changed or self.state != before

"""`metrics.jsonl`: one record of a step and stage to a line, whatever the disk does."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt_pp.metrics.records import Record, is_measured
from lopt_pp.util.files import write_text

logger = logging.getLogger(__name__)


class MetricsFile:
    """`metrics.jsonl`, one record to a line. Training goes on where it cannot be written.

    Args:
        path: of it.
        steps_done: before this run; the records of these steps stay in the file.

    Attributes:
        evaluations: of these steps, by step: what was measured on held-out rows, by name, where it is finite.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        self._path = path
        self._fails = False
        earlier = records_until(path, steps_done) if steps_done else []
        self.evaluations: dict[int, dict[str, float]] = {}
        for record in (json.loads(line) for line in earlier if '"eval_' in line):
            if values := measured(record):
                self.evaluations.setdefault(record["step"], {}).update(finite(values))
        self._guarded(lambda: write_text(path, "".join(earlier)))

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        self._guarded(lambda: self._append(lines))

    def _append(self, lines: str) -> None:
        # Opened each time, so that a directory which was removed and made again is found again.
        with self._path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                if file.write(data := lines.encode()) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(whole)  # No half line is left.
                raise

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            if not self._fails:
                logger.warning("%s cannot be written: %s. Training goes on", self._path, error.strerror)
            self._fails = True
        else:
            self._fails = False


def records_until(path: Path, step: int) -> list[str]:
    """The lines of a `metrics.jsonl` up to a step; without what was cut short or is not a record."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return lines


def measured(record: Record) -> dict[str, float]:
    """What a record has that was measured on held-out rows, by name."""
    return {
        name: float(value) for name, value in record.items() if is_measured(name) and isinstance(value, int | float)
    }


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those of the values that are numbers."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def is_evaluated(record: Record) -> bool:
    """Whether a record has a finite loss on the held-out rows."""
    return math.isfinite(record.get("eval_loss", math.nan))

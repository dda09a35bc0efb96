"""The rows of a data set as they are, from one file or many."""

import bisect
import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset

from lopt_pp.data.cache import made_once
from lopt_pp.data.text_files import Places
from lopt_pp.errors import LoptError, first_line

_ROWS_PER_BATCH = 10_000


class Part(Protocol):
    """A file of rows, or a table. It goes to other processes by its name, not by its content."""

    name: str

    @property
    def digest(self) -> str:
        """In hex: other content has another one."""

    def find(self) -> Places:
        """Where its rows are."""

    def read(self, starts: Sequence[int], stops: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows at these places."""

    def row_name(self, number: int, start: int) -> str:
        """What a message calls a row."""


class RawRows:
    """The rows of a data set as they are, with random access.

    Args:
        parts: that they come from, one behind the other.
        source: all of them, for messages.
        flag: that names the parts, if they are files.
        by_lines: whether each row is a line of a file.
    """

    def __init__(self, parts: Sequence[Part], source: str, flag: str = "", by_lines: bool = False) -> None:
        self.parts = parts
        self.source = source
        self.flag = flag
        self.by_lines = by_lines
        self._numbers: np.ndarray | None = None

    def select(self, numbers: np.ndarray) -> "RawRows":
        """Some of the rows, in the order given.

        Args:
            numbers: int64, of the rows.
        """
        selected = copy.copy(self)
        selected._numbers = numbers if self._numbers is None else self._numbers[numbers]
        return selected

    def with_parts(self, parts: Sequence[Part]) -> "RawRows":
        """The same rows of parts in place of others that have as many."""
        other = RawRows(parts, self.source, self.flag, self.by_lines)
        other._numbers = self._numbers
        return other

    @property
    def numbers(self) -> np.ndarray:
        """int64 [rows], of each row its number among all rows of the parts."""
        return np.arange(len(self)) if self._numbers is None else self._numbers

    def once(self) -> tuple["RawRows", np.ndarray | None]:
        """The rows without those that come again; and which of them each row is, None where none comes again."""
        if self._numbers is None:
            return self, None
        numbers, which = np.unique(self._numbers, return_inverse=True)
        if len(numbers) == len(self._numbers):
            return self, None
        all_of_them = len(numbers) == self._firsts[-1]
        whole = RawRows(self.parts, self.source, self.flag, self.by_lines)
        return whole if all_of_them else whole.select(numbers), which

    def the_same(self, numbers: Sequence[int]) -> np.ndarray:
        """The numbers of all rows that are one of these, which may come several times."""
        if self._numbers is None or not len(numbers):
            return np.array(numbers, dtype=np.int64)
        return np.flatnonzero(np.isin(self._numbers, self._numbers[list(numbers)]))

    @property
    def digest(self) -> str:
        """In hex: rows with other content have another one."""
        sha = hashlib.sha256(b"" if self._numbers is None else self._numbers.tobytes())
        for part in self.parts:
            with _readable(part):
                sha.update(part.digest.encode())
        return sha.hexdigest()

    @cached_property
    def _places(self) -> list[Places]:
        found = []
        for part in self.parts:
            with _readable(part):
                found.append(part.find())
            if not len(found[-1]):
                named = f"{self.flag} {part.name}" if self.flag else part.name
                raise LoptError(f"{named} has no rows; give data with a row or more")
        return found

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of the first row of each part, and that of all rows."""
        return [0, *accumulate(map(len, self._places))]

    @property
    def outline(self) -> bytes:
        """What can be told of the rows without reading them; others have another one, or may have.

        Checkpoints of streamed runs have it in their digest of the rows, so it stays as it is.
        """
        return self.outline_without(())

    def outline_without(self, numbers: Sequence[int]) -> bytes:
        """The outline as far as it does not depend on what these rows hold."""
        if not self.by_lines:
            return str(len(self)).encode()
        lengths = np.concatenate([places.stops - places.starts for places in self._places])
        lengths = lengths if self._numbers is None else lengths[self._numbers]
        lengths[self.the_same(numbers)] = 0
        return lengths.tobytes()

    def sizes(self) -> Iterator[int]:
        """How many rows each part has."""
        return map(len, self._places)

    def __len__(self) -> int:
        return self._firsts[-1] if self._numbers is None else len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row by its columns.

        Raises:
            LoptError: it is not a row, or its file has changed.
        """
        part, _, start, stop = self._find(index)
        return next(self.parts[part].read([start], [stop]))

    def name(self, index: int) -> str:
        """What a message calls a row: its number (from 1) and its file."""
        part, number, start, _ = self._find(index)
        return self.parts[part].row_name(number, start)

    def _find(self, index: int) -> tuple[int, int, int, int]:
        """A row's part, its number there, and where it starts and stops."""
        index = index if self._numbers is None else int(self._numbers[index])
        part = bisect.bisect_right(self._firsts, index) - 1
        number, places = index - self._firsts[part], self._places[part]
        return part, number, int(places.starts[number]), int(places.stops[number])

    def table(self) -> Dataset:
        """Where each row is: its `part` and its `number` there, int32, and its `start` and `stop`, int64.

        It is in a file, so that processes that are given parts of it need not be sent all of it.
        """
        return Dataset.from_file(str(made_once(f"{self.digest}-rows.arrow", self._write_table)))

    def _write_table(self, path: Path) -> None:
        sizes = [len(places) for places in self._places]
        columns = {
            "part": np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
            "number": np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
            "start": np.concatenate([places.starts for places in self._places]),
            "stop": np.concatenate([places.stops for places in self._places]),
        }
        table = pa.table(columns if self._numbers is None else {k: v[self._numbers] for k, v in columns.items()})
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, _ROWS_PER_BATCH)


@contextmanager
def _readable(part: Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoptError(f"--train_file {part.name} cannot be read: {error.strerror or first_line(error)}") from error

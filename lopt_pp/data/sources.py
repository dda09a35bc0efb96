"""Reads raw rows: local files and directories, data sets of the hub, and data sets that were saved to disk."""

import bisect
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError
from datasets.table import InMemoryTable

from lopt_pp.config.data import DataConfig
from lopt_pp.data.csv_files import CsvFile
from lopt_pp.data.files import builder_of, find_files, is_saved
from lopt_pp.data.json_files import JsonFile
from lopt_pp.data.table_files import TABLE_ERRORS, TableRows, open_arrow, open_parquet
from lopt_pp.data.text_files import Places
from lopt_pp.data.unpacking import unpacked
from lopt_pp.errors import LoptError, first_line


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
        self._flag = f"{flag} " if flag else ""
        self._by_lines = by_lines

    @cached_property
    def digest(self) -> str:
        """In hex: rows with other content have another one."""
        sha = hashlib.sha256()
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
                raise LoptError(f"{self._flag}{part.name} has no rows; give data with a row or more")
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
        if self._by_lines:
            return b"".join((places.stops - places.starts).tobytes() for places in self._places)
        return str(len(self)).encode()

    def __len__(self) -> int:
        return self._firsts[-1]

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
        part = bisect.bisect_right(self._firsts, index) - 1
        number, places = index - self._firsts[part], self._places[part]
        return part, number, int(places.starts[number]), int(places.stops[number])

    def table(self) -> Dataset:
        """Where each row is, as int64: its `part`, its `number` there, and its `start` and `stop`."""
        sizes = [len(places) for places in self._places]
        columns = {
            "part": np.repeat(np.arange(len(sizes)), sizes),
            "number": np.concatenate([np.arange(size) for size in sizes]),
            "start": np.concatenate([places.starts for places in self._places]),
            "stop": np.concatenate([places.stops for places in self._places]),
        }
        return Dataset(InMemoryTable(pa.table(columns)))


@contextmanager
def _readable(part: Part) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LoptError(f"--train_file {part.name} cannot be read: {error.strerror or first_line(error)}") from error


def read_rows(config: DataConfig) -> RawRows:
    """The raw rows that `config` names.

    Raises:
        LoptError: they cannot be read. That there are none is said when they are asked for.
    """
    if config.train_file:
        return _read_files(config.train_file)
    source = ", ".join(filter(None, (config.dataset_name, config.dataset_config)))
    return RawRows([TableRows(_load_dataset(config), source)], source)


def _read_files(given: Sequence[str]) -> RawRows:
    paths = list(find_files(given))
    source = str(paths[0])
    if len(paths) > 1:
        times = Counter(path.resolve() for path in paths)
        twice = [f"{path.name} {count} times" for path, count in times.items() if count > 1]
        source = f"{', '.join(given)} ({', '.join([f'{len(paths)} files', *twice])})"
    by_lines = all(path.suffix.lower() == ".jsonl" for path in paths)
    return RawRows([_open(path) for path in paths], source, "--train_file", by_lines)


_OPEN: dict[str, Callable[[Path, str], Part]] = {
    "json": JsonFile,
    "csv": CsvFile,
    "parquet": open_parquet,
    "arrow": open_arrow,
}


def _open(path: Path) -> Part:
    if path.is_dir():
        return TableRows(load_saved(path, "train"), str(path))
    builder = builder_of(path)
    assert builder is not None
    try:
        return _OPEN[builder](unpacked(path), str(path))
    except TABLE_ERRORS as error:
        raise LoptError(
            f"--train_file {path} cannot be read: {first_line(error)}; give a valid {builder} file"
        ) from error


def load_saved(path: Path, split: str) -> Dataset:
    """A data set that `datasets` has saved to disk, or a split of one.

    Raises:
        LoptError: it cannot be read, or has no such split.
    """
    try:
        saved = datasets.load_from_disk(str(path))
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise LoptError(f"{path}, saved by `datasets`, cannot be read: {first_line(_root(error))}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise LoptError(f"{path} has no split {split}, but {', '.join(saved)}; give its directory, {path}/SPLIT")
        saved = saved[split]
    return saved


def _load_dataset(config: DataConfig) -> Dataset:
    assert config.dataset_name is not None
    if is_saved(Path(config.dataset_name)):
        return load_saved(Path(config.dataset_name), config.dataset_split)
    try:
        return datasets.load_dataset(config.dataset_name, config.dataset_config, split=config.dataset_split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        given = f"--dataset_name {config.dataset_name} "
        if config.dataset_config is not None:
            given += f"--dataset_config {config.dataset_config} "
        raise LoptError(
            f"{given}--dataset_split {config.dataset_split} cannot be loaded: {first_line(_root(error))}"
        ) from error


@contextmanager
def quiet_unless(shows: bool) -> Iterator[None]:
    """Keeps the progress bars of `datasets` to the process that shows them."""
    hide = not shows and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _root(error: BaseException) -> BaseException:
    """The error at the bottom of a chain of causes: `datasets` wraps what went wrong in general words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

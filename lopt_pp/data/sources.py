"""Reads raw rows: local files and directories, data sets of the hub, and data sets that were saved to disk."""

import bisect
import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetsError

from lopt_pp.config.data import DataConfig
from lopt_pp.data.files import COMPRESSIONS, builder_of, find_files, is_saved
from lopt_pp.errors import LoptError, first_line


class RawRows(Protocol):
    """The rows of a data set as they are, with random access."""

    @property
    def source(self) -> str:
        """Where they come from, for messages."""

    @property
    def outline(self) -> bytes:
        """What can be told of the rows without reading them; others have another one, or may have."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row by its columns.

        Raises:
            LoptError: it is not a row.
        """

    def name(self, index: int) -> str:
        """What a message calls a row: its number (from 1) and its file."""


class _Parts:
    """The files that rows come from, one behind the other."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        self._names = names
        self._starts = [0, *accumulate(sizes)]

    def find(self, index: int) -> tuple[int, int]:
        """The file of a row, and the row's place in it."""
        part = bisect.bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def name(self, index: int) -> str:
        part, place = self.find(index)
        return f"row {place + 1} of {self._names[part]}"

    def __len__(self) -> int:
        return self._starts[-1]


class Table:
    """Raw rows in tables of `datasets`, which maps them from disk.

    Args:
        parts: the tables, by their names for messages; rows are taken from one after the other.
        source: all of them, for messages.

    Attributes:
        name: what a message calls a row.
        dataset: all the tables.
    """

    def __init__(self, parts: Sequence[tuple[str, Dataset]], source: str) -> None:
        self.source = source
        self._parts = _Parts([name for name, _ in parts], [len(table) for _, table in parts])
        self.name = self._parts.name
        tables = [table for _, table in parts]
        self.dataset = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)

    @property
    def outline(self) -> bytes:
        return str(len(self)).encode()

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


class JsonLines:
    """Raw rows in JSONL files, read where they are: only the places of the lines are found beforehand.

    Args:
        paths: of the files.
        source: all of them, for messages.
    """

    def __init__(self, paths: Sequence[Path], source: str) -> None:
        self.source = source
        self._files = [_map(path) for path in paths]
        self._starts, self._stops = zip(*map(_find_lines, self._files), strict=True)
        self._parts = _Parts([str(path) for path in paths], [len(starts) for starts in self._starts])

    @property
    def outline(self) -> bytes:
        return b"".join((stops - starts).tobytes() for starts, stops in zip(self._starts, self._stops, strict=True))

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, place = self._parts.find(index)
        line = self._files[part][self._starts[part][place] : self._stops[part][place]]
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LoptError(f"it is not JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise LoptError(f"it is not a JSON object, but {type(row).__name__}")
        return row

    def name(self, index: int) -> str:
        return self._parts.name(index)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _find_lines(content: mmap.mmap, chunk: int = 1 << 26) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines that are not empty start and stop, in bytes."""
    found = []
    for start in range(0, len(content), chunk):
        found.append(np.flatnonzero(np.frombuffer(content[start : start + chunk], np.uint8) == ord("\n")) + start)
    stops = np.concatenate([*found, [len(content)]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1])
    filled = stops > starts
    for line in np.flatnonzero(stops - starts == 1):
        filled[line] = content[starts[line]] != ord("\r")
    return starts[filled], stops[filled]


def read_rows(config: DataConfig) -> RawRows:
    """The raw rows that `config` names.

    Raises:
        LoptError: they cannot be read, or there are none.
    """
    if config.train_file:
        rows = _read_files(config.train_file, in_place=config.streaming)
    else:
        source = ", ".join(filter(None, (config.dataset_name, config.dataset_config)))
        rows = Table([(source, _load_dataset(config))], source)
    if len(rows) == 0:
        raise LoptError(f"{rows.source} has no rows; give data with a row or more")
    return rows


def _read_files(given: Sequence[str], in_place: bool) -> RawRows:
    paths = list(find_files(given))
    source = str(paths[0]) if len(paths) == 1 else f"{', '.join(given)} ({len(paths)} files)"
    if in_place and all(path.suffix.lower() == ".jsonl" for path in paths):
        return JsonLines(paths, source)
    tables = [(str(path), load_saved(path, "train") if path.is_dir() else _load_file(path)) for path in paths]
    try:
        return Table(tables, source)
    except ValueError as error:
        raise LoptError(
            f"--train_file: the columns of {source} do not go together: {first_line(error)}; give them like types, or "
            f"train on one of them"
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


def _load_file(path: Path) -> Dataset:
    builder = builder_of(path)
    size = path.stat().st_size
    try:
        options: dict[str, Any] = {}
        if builder == "json":
            # `datasets` takes the columns from the first chunk and fails at a key that first appears in a later one.
            # It would also take rows with the columns of an agent's trace for such a trace, whatever they hold.
            unpacked = 40 * size if path.suffix.lower() in COMPRESSIONS else size
            options = {"chunksize": max(unpacked, 10 << 20), "parse_agent_traces": False}
        elif builder == "csv":
            # All columns are text: an answer "007" or "None" is neither a number nor an absent value.
            columns = pd.read_csv(path, nrows=0).columns
            options = {"features": Features({column: Value("string") for column in columns})}
            options |= {"keep_default_na": False, "na_values": [""]}
        return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise LoptError(
            f"--train_file {path} cannot be read: {first_line(_root(error))}; give a valid {builder} file with a row "
            f"or more"
        ) from error


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

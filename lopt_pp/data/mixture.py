"""Rows of several data sets as one, in the shares that a mixture gives them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError

from lopt_pp.config.data import DataConfig
from lopt_pp.config.mixture import MixtureEntry, entry_name
from lopt_pp.data.raw_rows import Part, RawRows
from lopt_pp.data.sources import read_files, read_rows, root_of, split_of
from lopt_pp.data.table_files import TableRows
from lopt_pp.data.text_files import Places
from lopt_pp.errors import LoptError, first_line
from lopt_pp.util.seeds import derive_seed


def read_mixture(entries: Sequence[MixtureEntry], seed: int) -> RawRows:
    """The rows of all entries, one data set behind the other.

    Args:
        entries: of the mixture.
        seed: that draws the rows of entries which are not taken a whole number of times.

    Raises:
        LoptError: an entry cannot be read; the text has its number.
    """
    read = []
    for number, entry in enumerate(entries, start=1):
        with _named(number, entry):
            raw = _read(entry)
            if entry.columns is not None:
                raw = raw.with_parts([_Columns(part, entry.columns) for part in raw.parts])
            read.append(raw)
            len(raw)  # That it has rows is said with its number.
    taken = _taken([len(raw) for raw in read], entries, seed)
    named = [
        raw.source if share is None else f"{raw.source}: {len(share)} of {len(raw)} rows"
        for raw, share in zip(read, taken, strict=True)
    ]
    source = f"{len(read)} data sets ({'; '.join(named)})"
    numbers, first = [], 0
    for raw, share in zip(read, taken, strict=True):
        own = raw.numbers
        numbers.append(first + (own if share is None else own[share]))
        first += sum(raw.sizes())
    whole = RawRows([part for raw in read for part in raw.parts], source, "--datasets", all(r.by_lines for r in read))
    chosen = np.concatenate(numbers)
    return whole if np.array_equal(chosen, np.arange(len(whole))) else whole.select(chosen)


def _taken(sizes: Sequence[int], entries: Sequence[MixtureEntry], seed: int) -> list[np.ndarray | None]:
    """Which rows of each data set are taken, in order; None for all of them, once."""
    if entries[0].fraction is not None:  # Then all have one. As `trl.scripts.utils.get_dataset` does.
        total = sum(entry.fraction or 0.0 for entry in entries)
        weights = [(entry.fraction or 0.0) / total for entry in entries]
        most = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        return [np.arange(round(weight * most)) for weight in weights]
    taken: list[np.ndarray | None] = []
    for number, (size, entry) in enumerate(zip(sizes, entries, strict=True)):
        if entry.repeats is None:
            taken.append(None)
            continue
        times, rest = divmod(entry.repeats, 1)
        generator = torch.Generator().manual_seed(derive_seed(seed, 2, number))
        drawn = torch.randperm(size, generator=generator)[: round(rest * size)].sort().values.numpy()
        taken.append(np.concatenate([np.tile(np.arange(size), int(times)), drawn]))
    return taken


def _read(entry: MixtureEntry) -> RawRows:
    if (files := entry.local_files) is not None:
        return split_of(read_files(files), entry.split)
    if entry.data_dir is None and entry.data_files is None:
        return read_rows(DataConfig(dataset_name=entry.path, dataset_config=entry.name, dataset_split=entry.split))
    try:
        table = datasets.load_dataset(
            entry.path, entry.name, data_dir=entry.data_dir, data_files=entry.data_files, split=entry.split
        )
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise LoptError(f"it cannot be loaded: {first_line(root_of(error))}") from error
    return RawRows([TableRows(table, entry.path)], entry.path)


@contextmanager
def _named(number: int, entry: MixtureEntry) -> Iterator[None]:
    """Has an error say which entry it is of, and in whose words."""
    try:
        yield
    except LoptError as error:
        text = str(error)
        for ours, theirs in (("--train_file ", ""), ("--dataset_name ", ""), ("--dataset_config ", "name ")):
            text = text.replace(ours, theirs)
        text = text.replace("--dataset_split ", "split ")
        raise LoptError(f"{entry_name(number, {'path': entry.path})}: {text}") from error


class _Columns:
    """A part of which rows have some columns only."""

    def __init__(self, part: Part, columns: Sequence[str]) -> None:
        self.name = part.name
        self._part = part
        self._columns = tuple(columns)

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self._part.digest}{self._columns}".encode()).hexdigest()

    def find(self) -> Places:
        return self._part.find()

    def read(self, starts: Sequence[int], stops: Sequence[int]) -> Iterator[dict[str, Any]]:
        for row in self._part.read(starts, stops):
            found = {column: row[column] for column in self._columns if column in row}
            if not found:
                named = ", ".join(self._columns)
                raise LoptError(f"{self.name}: a row has none of the columns {named} (it has: {', '.join(row)})")
            yield found

    def row_name(self, number: int, start: int) -> str:
        return self._part.row_name(number, start)

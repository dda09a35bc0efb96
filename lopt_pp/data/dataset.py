"""The rows to train on, as the sampler takes them."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from datasets import Dataset

from lopt_pp.data.encoding import EncodedRow
from lopt_pp.data.formats import IGNORE_INDEX
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class Pack:
    """What makes one sequence of a microbatch: a row of the data, or several.

    Attributes:
        num_tokens: of all of them.
        num_targets: predicted tokens with a loss, of all of them.
        read: gives them.
    """

    num_tokens: int
    num_targets: int
    read: Callable[[], list[EncodedRow]]


class UnusableRowsError(LoptError):
    """Rows of a step that cannot be trained on, found only when the step comes.

    Attributes:
        numbers: of all of these rows of the step, from 0.
    """

    def __init__(self, message: str, numbers: Sequence[int]) -> None:
        super().__init__(message)
        self.numbers = tuple(numbers)


class NoUsableRowsError(LoptError):
    """There are rows, and none of them can be used.

    Attributes:
        source: that they are of.
    """

    def __init__(self, message: str, source: str) -> None:
        super().__init__(message)
        self.source = source


class Rows(Protocol):
    """What a data order permutes: rows, or packs of rows."""

    @property
    def rows_per_pack(self) -> float:
        """How many of what is permuted make a sequence of a microbatch, on average."""

    @property
    def source(self) -> str:
        """The files or the data set that they come from, for messages."""

    @property
    def lengths(self) -> np.ndarray:
        """int64 [rows], the number of tokens of each."""

    @property
    def digest(self) -> str:
        """In hex: processes with other data, or other tokens of it, have another one."""

    def digest_without(self, numbers: Sequence[int]) -> str:
        """The digest as far as it does not depend on what these rows hold: they were unusable, and may be mended."""

    def __len__(self) -> int: ...

    def fetch(self, numbers: np.ndarray) -> list[Pack]:
        """The packs of a step, from the numbers that the order has drawn for it.

        Raises:
            UnusableRowsError: rows are malformed, or cannot be read.
        """

    def prefetch(self, numbers: np.ndarray) -> None:
        """Says that these are read next, so that they may be made ready."""

    def left_out(self, numbers: np.ndarray) -> str:
        """Which of these rows, which have been fetched, are left out of their step, and why; empty where none are."""

    def summary(self) -> str:
        """One line for the log: where the rows are from, and what was left out or changed, and why."""


class TokenizedRows:
    """The rows to train on, in the order of the data set; their tokens stay on disk until a row is asked for.

    Attributes:
        dataset: the columns that it is made of.
        source: the file or data set that they come from, for messages.
        dropped: how many rows were left out, by reason; reasons without rows are absent.
        changed: how many of the others were changed, by what was done; changes without rows are absent.
        unused: the columns that nothing was made of.
        lengths: int64 [rows], the number of tokens of each row.
        num_targets: int64 [rows], the number of predicted tokens with a loss: of labels other than -100, after the
            first, which nothing predicts.
    """

    rows_per_pack = 1.0

    def __init__(
        self,
        dataset: Dataset,
        source: str,
        dropped: Mapping[str, int],
        changed: Mapping[str, int] | None = None,
        unused: Sequence[str] = (),
    ) -> None:
        """Takes a data set with the columns `input_ids`, `labels`, `length` and `num_targets`; see `load_rows`."""
        self.dataset = dataset
        self.source = source
        self.dropped = dict(dropped)
        self.changed = dict(changed or {})
        self.unused = tuple(unused)
        self.lengths = column(dataset, "length")
        self.num_targets = column(dataset, "num_targets")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EncodedRow:
        row = self.dataset[index]
        return EncodedRow(row["input_ids"], row["labels"])

    def select(self, numbers: np.ndarray, others: str) -> "TokenizedRows":
        """Some of the rows, in the order given; the rest counts as left out.

        Args:
            numbers: of the rows.
            others: why the rest is left out, for `dropped`.
        """
        dropped = self.dropped | {others: len(self) - len(numbers)}
        return TokenizedRows(self.dataset.select(numbers), self.source, dropped, self.changed, self.unused)

    def read(self, numbers: np.ndarray) -> list[EncodedRow]:
        """Some rows, by their numbers."""
        return [self[int(number)] for number in numbers]

    def count_targets(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Of pieces of rows, the labels other than -100, int64 [pieces].

        Args:
            rows: int64 [pieces], the numbers of the rows.
            starts: int64 [pieces], of the first token that counts.
            stops: int64 [pieces], behind the last.
        """
        numbers, places = np.unique(rows, return_inverse=True)
        counts = np.zeros(len(rows), dtype=np.int64)
        order, done, first = np.argsort(places, kind="stable"), 0, 0
        for table in self.dataset.select(numbers).with_format("arrow").iter(batch_size=1000):
            labels = table["labels"].combine_chunks()
            firsts = np.concatenate(([0], np.cumsum(labels.value_lengths().to_numpy())))
            before = np.concatenate(([0], np.cumsum(labels.flatten().to_numpy() != IGNORE_INDEX)))
            stop = int(np.searchsorted(places[order], first + len(table)))
            own = order[done:stop]
            begins = firsts[places[own] - first]
            counts[own] = before[begins + stops[own]] - before[begins + starts[own]]
            done, first = stop, first + len(table)
        return counts

    def fetch(self, numbers: np.ndarray) -> list[Pack]:
        sizes = zip(self.lengths[numbers].tolist(), self.num_targets[numbers].tolist(), strict=True)
        return [
            Pack(*size, functools.partial(self.read, numbers[place : place + 1])) for place, size in enumerate(sizes)
        ]

    def prefetch(self, numbers: np.ndarray) -> None:
        """Nothing to do: they are on disk."""

    def left_out(self, numbers: np.ndarray) -> str:
        return ""  # They are left out before the first step.

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of all token ids and labels in order: processes with other data have another one."""
        sha = hashlib.sha256()
        for table in self.dataset.with_format("arrow").iter(batch_size=1000):
            for name in ("input_ids", "labels"):
                values = table[name].combine_chunks()
                sha.update(values.value_lengths().to_numpy().tobytes())
                sha.update(values.flatten().to_numpy().tobytes())
        return sha.hexdigest()

    def digest_without(self, numbers: Sequence[int]) -> str:
        return self.digest  # All of them are usable.

    def summary(self) -> str:
        """One line for the log, such as `12 rows of train.jsonl: 10 used, 2 left out (2 without a target token)`."""
        return summarize(self.source, len(self), self.dropped, self.changed, self.unused)


_SHOWN = 12
"""Columns that a line names; a table may have hundreds."""


def summarize(
    source: str, num_used: int, dropped: Mapping[str, int], changed: Mapping[str, int], unused: Sequence[str] = ()
) -> str:
    """How many rows there are, and what became of them and of their columns."""
    num_dropped = sum(dropped.values())
    line = f"{num_used + num_dropped} rows of {source}: {num_used} used"
    if num_dropped:
        line += f", {num_dropped} left out ({listed(dropped)})"
    if changed:
        line += f"; {listed(changed)}"
    if unused:
        more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
        named = ", ".join(unused[:_SHOWN])
        line += f"; column {named} is not used" if len(unused) == 1 else f"; columns {named}{more} are not used"
    return line


def listed(counts: Mapping[str, int]) -> str:
    """Reasons with their counts, for a message."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def column(dataset: Dataset, name: str) -> np.ndarray:
    """A column of numbers, int64."""
    return dataset.with_format("numpy")[name][:].astype(np.int64)

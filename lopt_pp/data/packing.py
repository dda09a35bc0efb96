"""Packs rows by their lengths, with TRL's own packing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable
from trl import pack_dataset

from lopt_pp.config.data import PackingStrategy
from lopt_pp.data.sources import quiet_unless

_TOGETHER = 1000
"""Rows that TRL packs together: those of a batch of `Dataset.map`."""

_ROWS, _TOKENS = 20_000, 2**24
"""So much is given to TRL at once, where it is more than `_TOGETHER` rows, as one number for each token."""


class Piece(NamedTuple):
    """Tokens of a row, from `start` to before `stop`."""

    row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Packs:
    """Which pieces of which rows make a pack, in order.

    Attributes:
        rows, starts, stops: int64 [pieces]; see `Piece`.
        bounds: int64 [packs + 1], the pieces of each pack, from `bounds[n]` to before `bounds[n + 1]`.
    """

    rows: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> list[Piece]:
        own = slice(self.bounds[number], self.bounds[number + 1])
        columns = (values[own].tolist() for values in (self.rows, self.starts, self.stops))
        return [Piece(*piece) for piece in zip(*columns, strict=True)]

    def totals(self, of_pieces: np.ndarray) -> np.ndarray:
        """The sum over the pieces of each pack, int64 [packs], of a number for each piece, int64 [pieces]."""
        return np.diff(np.concatenate(([0], np.cumsum(of_pieces)))[self.bounds])


def pack(lengths: np.ndarray, max_length: int, strategy: PackingStrategy = "bfd") -> Packs:
    """Packs rows into packs of at most `max_length` tokens, as `trl.pack_dataset` does.

    Args:
        lengths: int64 [rows], each 1 or more; with `bfd` at most `max_length`.
        max_length: in tokens.
        strategy: `bfd`, best fit decreasing: as few packs as it finds, of whole rows. `bfd_split` cuts longer rows into
            pieces of `max_length` first. `wrapped` cuts all rows, one behind the other, every `max_length` tokens.

    Source: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    with quiet_unless(False):
        parts = list(_parts(lengths, max_length, strategy))
    nothing = np.zeros(0, dtype=np.int64)
    rows, starts, stops = (
        np.concatenate([nothing, *(getattr(part, name) for part in parts)]) for name in ("rows", "starts", "stops")
    )
    sizes = np.concatenate([nothing, *(np.diff(part.bounds) for part in parts)])
    return Packs(rows, starts, stops, np.concatenate(([0], np.cumsum(sizes))))


def _parts(lengths: np.ndarray, max_length: int, strategy: PackingStrategy) -> Iterator[Packs]:
    """The packs of some rows after others, each of as many batches of TRL's as there is room for."""
    start = 0
    while start < len(lengths):
        stop, tokens = start, 0
        while stop == start or (stop < min(len(lengths), start + _ROWS) and tokens < _TOKENS):
            tokens += int(lengths[stop : stop + _TOGETHER].sum())
            stop += _TOGETHER
        part = _pack(lengths[start:stop], max_length, strategy)
        yield Packs(part.rows + start, part.starts, part.stops, part.bounds)
        start = stop


def _pack(lengths: np.ndarray, max_length: int, strategy: PackingStrategy) -> Packs:
    """TRL packs tokens; each is given as its number among all of them, so its place tells what was done to it."""
    firsts = np.concatenate(([0], np.cumsum(lengths)))
    tokens = pa.ListArray.from_arrays(
        pa.array(firsts.astype(np.int32)), pa.array(np.arange(firsts[-1], dtype=np.int32))
    )
    packed = pack_dataset(Dataset(InMemoryTable(pa.table({"row": tokens}))), max_length, strategy=strategy)
    table = packed.with_format("arrow")[:]
    given = table["row"].combine_chunks()
    edges = np.concatenate(([0], np.cumsum(given.value_lengths().to_numpy())))
    if strategy == "wrapped":  # All tokens are in order: what they are cut at are the ends of packs and of rows.
        cuts = np.union1d(edges, firsts)
        starts, stops = cuts[:-1], cuts[1:]
        bounds = np.searchsorted(cuts, edges)
    else:
        within = table["seq_lengths"].combine_chunks()
        sizes = within.flatten().to_numpy().astype(np.int64)
        starts = given.flatten().to_numpy()[np.cumsum(sizes) - sizes].astype(np.int64)
        stops = starts + sizes
        bounds = np.concatenate(([0], np.cumsum(within.value_lengths().to_numpy())))
    rows = np.searchsorted(firsts, starts, side="right") - 1
    return Packs(rows, starts - firsts[rows], stops - firsts[rows], bounds)

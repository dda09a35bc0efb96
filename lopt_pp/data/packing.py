"""Packs rows by their lengths, best fit first, with TRL's own packing."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable
from trl import pack_dataset

from lopt_pp.data.sources import quiet_unless

_ROWS = 20_000
"""Rows that are given to TRL at once, as one number for each token of theirs; it packs 1,000 of them together."""


def pack(lengths: np.ndarray, max_length: int) -> list[np.ndarray]:
    """Packs rows into as few of at most `max_length` tokens as best fit decreasing finds (`trl.pack_dataset`, `bfd`).

    Args:
        lengths: int64 [rows], each from 1 to `max_length`.
        max_length: in tokens.

    Returns:
        Of each pack, the numbers of its rows, int64.

    Source: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
    """
    with quiet_unless(False):
        return [numbers for start in range(0, len(lengths), _ROWS) for numbers in _pack(lengths, start, max_length)]


def _pack(lengths: np.ndarray, start: int, max_length: int) -> Iterator[np.ndarray]:
    """Packs the `_ROWS` rows from `start` on. TRL packs tokens; each is given here as the number of its row."""
    own = lengths[start : start + _ROWS]
    numbers = np.repeat(np.arange(len(own), dtype=np.int32), own)
    offsets = np.concatenate(([0], np.cumsum(own))).astype(np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers))
    packed = pack_dataset(Dataset(InMemoryTable(pa.table({"row": column}))), max_length, strategy="bfd")
    for rows, sizes in zip(packed["row"], packed["seq_lengths"], strict=True):
        firsts = np.cumsum([0, *sizes[:-1]])
        yield start + np.array(rows, dtype=np.int64)[firsts]

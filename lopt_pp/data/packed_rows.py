"""Rows that are packed, or split, once all of them are tokenized."""

import copy
import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lopt_pp.config.data import PackingStrategy
from lopt_pp.data.dataset import Pack, TokenizedRows
from lopt_pp.data.encoding import EncodedRow
from lopt_pp.data.packing import Packs, Piece, pack
from lopt_pp.errors import LoptError
from lopt_pp.util.seeds import derive_seed


class PackedRows:
    """Rows that were packed into rows of at most `max_length` tokens, which is what the order permutes.

    Args:
        rows: to pack.
        max_length: of a pack, in tokens.
        strategy: how they are packed; see `pack`. With `wrapped` a pack is one row, whatever rows it is made of.
        seed: that the rows are shuffled by before they are wrapped, as TRL does, so that those of a pack do not hang
            together; None leaves them as they come.

    Raises:
        LoptError: nothing could be learned from any pack.
    """

    rows_per_pack = 1.0

    def __init__(
        self, rows: TokenizedRows, max_length: int, strategy: PackingStrategy = "bfd", seed: int | None = None
    ) -> None:
        self._rows = rows
        self._max_length = max_length
        self._is_wrapped = strategy == "wrapped"
        order = np.arange(len(rows))
        if self._is_wrapped and seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(seed, 1))
            order = torch.randperm(len(rows), generator=generator).numpy()
        packs = pack(rows.lengths[order], max_length, strategy)
        self._packs = Packs(order[packs.rows], packs.starts, packs.stops, packs.bounds)
        self.lengths = packs.totals(packs.stops - packs.starts)
        self._num_targets = self._packs.totals(self._targets_of_pieces())
        if not self._num_targets.any():
            raise LoptError(
                f"--packing_strategy {strategy} with --max_length {max_length} cuts the rows of {rows.source} so that "
                f"no pack has a target token; raise --max_length"
            )

    def _targets_of_pieces(self) -> np.ndarray:
        """Of each piece the tokens with a loss: all but the first of a row, or with `wrapped` of a pack."""
        packs, counts = self._packs, self._rows.num_targets[self._packs.rows]
        starts = packs.starts + 1
        cut = packs.stops - packs.starts < self._rows.lengths[packs.rows]
        if self._is_wrapped:
            starts, cut = packs.starts.copy(), np.ones(len(starts), dtype=bool)
            starts[packs.bounds[:-1]] += 1
        if cut.any():
            counts[cut] = self._rows.count_targets(packs.rows[cut], starts[cut], packs.stops[cut])
        return counts

    def __len__(self) -> int:
        return len(self._packs)

    def fetch(self, numbers: np.ndarray) -> list[Pack]:
        return [
            Pack(
                int(self.lengths[number]),
                int(self._num_targets[number]),
                functools.partial(self._read, int(number)),
            )
            for number in numbers
        ]

    def _read(self, number: int) -> list[EncodedRow]:
        pieces = [read_piece(self._rows, piece) for piece in self._packs[number]]
        return [joined(pieces)] if self._is_wrapped else pieces

    def prefetch(self, numbers: np.ndarray) -> None:
        """Nothing to do: they are on disk."""

    def left_out(self, numbers: np.ndarray) -> str:
        return ""  # They are left out before they are packed.

    @property
    def source(self) -> str:
        """That of the rows."""
        return self._rows.source

    @property
    def digest(self) -> str:
        """Of the rows; flags decide the packs."""
        return self._rows.digest

    def digest_without(self, numbers: Sequence[int]) -> str:
        return self.digest  # All of them are usable.

    def summary(self) -> str:
        """That of the rows, and how full the packs are."""
        filled = self.lengths.mean() / self._max_length
        num_split = int((self._rows.lengths > self._max_length).sum())
        split = f", {num_split} longer ones in pieces" if num_split and not self._is_wrapped else ""
        how = "one behind the other, cut" if self._is_wrapped else "packed"
        num_empty = int((self._num_targets == 0).sum())
        empty = f"; {num_empty} without a target token: raise --max_length to learn from all" if num_empty else ""
        return (
            f"{self._rows.summary()}; {how} into {len(self)} of {self._max_length} tokens{split}, {filled:.1%} of them "
            f"filled{empty}"
        )


class SplitRows(TokenizedRows):
    """Rows of which the longer ones are split into pieces of `max_length` tokens, each a row: to be evaluated on."""

    def __init__(self, rows: TokenizedRows, max_length: int) -> None:
        super().__init__(rows.dataset, rows.source, rows.dropped, rows.changed, rows.unused)
        self._max_length = max_length
        sizes = -(-rows.lengths // max_length)
        self._numbers = np.repeat(np.arange(len(rows)), sizes)
        self._starts = max_length * (np.arange(len(self._numbers)) - np.repeat(np.cumsum(sizes) - sizes, sizes))
        self._stops = np.minimum(self._starts + max_length, rows.lengths[self._numbers])
        self._whole = rows
        self.lengths = self._stops - self._starts
        self.num_targets = rows.count_targets(self._numbers, self._starts + 1, self._stops)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> EncodedRow:
        return read_piece(self._whole, Piece(*(int(of[index]) for of in (self._numbers, self._starts, self._stops))))

    def select(self, numbers: np.ndarray, others: str) -> "SplitRows":
        """Some of the pieces; see `TokenizedRows.select`."""
        selected = copy.copy(self)
        selected.dropped = self.dropped | {others: len(self) - len(numbers)}
        for name in ("_numbers", "_starts", "_stops", "lengths", "num_targets"):
            setattr(selected, name, getattr(self, name)[numbers])
        return selected

    @functools.cached_property
    def digest(self) -> str:
        """Of the rows, of where they are split, and of which pieces there are."""
        pieces = hashlib.sha256(np.stack([self._numbers, self._starts, self._stops]).tobytes()).hexdigest()
        return hashlib.sha256(f"{self._whole.digest}{pieces}".encode()).hexdigest()

    def summary(self) -> str:
        """That of the rows, and into how many they are split."""
        split = f"; split into {len(self)} of at most {self._max_length} tokens"
        return self._whole.summary() + (split if len(self) > len(self._whole) else "")


def read_piece(rows: TokenizedRows, piece: Piece) -> EncodedRow:
    row = rows[piece.row]
    return EncodedRow(row.input_ids[piece.start : piece.stop], row.labels[piece.start : piece.stop])


def joined(rows: Iterable[EncodedRow]) -> EncodedRow:
    """Rows as one, one behind the other."""
    rows = list(rows)
    return EncodedRow([i for row in rows for i in row.input_ids], [label for row in rows for label in row.labels])

"""What a model can take of a row: rows beyond it are refused by name before they are trained on."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from lopt_pp.errors import LoptError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowLimits:
    """What a model can take of a row. (That its ids are those of the tokenizer is known by then.)

    Attributes:
        num_embeddings: token ids are below it.
        num_outputs: labels are below it.
        num_positions: of a table of positions, the most tokens that a row may have; None where there is no table.
        trained_positions: the most tokens that the model was pretrained with, for a warning; None where the config does
            not say it.
    """

    num_embeddings: int
    num_outputs: int
    num_positions: int | None = None
    trained_positions: int | None = None

    def for_pieces(self, max_length: int) -> "RowLimits":
        """The limits of rows that are split into pieces of `max_length` tokens: they may be of any length.

        Raises:
            LoptError: the model cannot take such pieces.
        """
        if self.num_positions is not None and max_length > self.num_positions:
            raise LoptError(
                f"--packing_strategy makes rows of --max_length {max_length} tokens, and the model's table of "
                f"positions has {self.num_positions}; give --max_length {self.num_positions}"
            )
        return dataclasses.replace(self, num_positions=None)

    def check(self, name: str, input_ids: np.ndarray, labels: np.ndarray) -> None:
        """Sees that the model can take a row.

        Args:
            name: of the row, for messages.
            input_ids: int `[tokens]`.
            labels: int `[tokens]`.

        Raises:
            LoptError: it cannot.
        """
        if self.num_positions is not None and len(input_ids) > self.num_positions:
            raise LoptError(
                f"{name}: it has {len(input_ids)} tokens, and the model's table of positions has {self.num_positions}; "
                f"--max_length {self.num_positions} leaves such rows out"
            )
        for what, ids, number in (
            ("token id", input_ids, self.num_embeddings),
            ("label", labels, self.num_outputs),
        ):
            wrong = ids[ids >= number]
            if len(wrong) > 0:
                raise LoptError(
                    f"{name}: the {what} {wrong[0]} is outside the model's, which go from 0 to {number - 1}; take the "
                    f"tokenizer that belongs to the model, or name the new tokens by --added_tokens, so that the "
                    f"model gets embeddings for them"
                )

    def check_all(self, rows: Dataset, lengths: np.ndarray, name: Callable[[int], str]) -> None:
        """Sees that the model can take all rows.

        Args:
            rows: with the columns `input_ids` and `labels`.
            lengths: int `[rows]`, their numbers of tokens.
            name: the name of a row, from its place among these.

        Raises:
            LoptError: it cannot; the text names the first such row.
        """
        start = 0
        for table in rows.with_format("arrow").iter(batch_size=1000):
            stop = start + len(table)
            suspect = self.num_positions is not None and bool((lengths[start:stop] > self.num_positions).any())
            for column, number in (("input_ids", self.num_embeddings), ("labels", self.num_outputs)):
                values = table[column].combine_chunks().flatten().to_numpy()
                suspect |= bool((values >= number).any())
            for place in range(start, stop) if suspect else ():
                row = rows[place]
                self.check(name(place), np.array(row["input_ids"]), np.array(row["labels"]))
            start = stop

    def warn_of(self, longest: int) -> None:
        """Says where rows are longer than those that the model was pretrained with."""
        if self.num_positions is None and self.trained_positions is not None and longest > self.trained_positions:
            logger.warning(
                "rows have up to %d tokens, and the model was pretrained with up to %d (max_position_embeddings): it "
                "may do badly beyond; --max_length %d leaves longer rows out",
                longest,
                self.trained_positions,
                self.trained_positions,
            )

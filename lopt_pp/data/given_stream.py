"""The rows of an `IterableDataset` that a script gives: read before the first step, as many as a run needs."""

import itertools
import logging
import math

import datasets
from datasets import Dataset, IterableDataset

from lopt_pp.data.table_files import as_dataset
from lopt_pp.errors import LoptError
from lopt_pp.util.user_code import describe

_PER_TABLE = 10_000
"""Rows that are put into one table."""

_TABLES_BEFORE_A_WARNING = 20
"""After so many, whoever waits for a stream that never ends learns why."""

_TIMES_BEFORE_AN_END = 100
"""Rows that are read for each that is wanted, at most, where hardly any of them can be used."""

logger = logging.getLogger(__name__)


class GivenStream:
    """A stream, as far as it has been read: the order of a run, and a resume, need to know of all rows beforehand.

    Args:
        stream: of a script.
        argument: what it is called, in messages.
        most: rows that the run can use; None for all of them.

    Raises:
        LoptError: it has no rows, or cannot be read.
    """

    def __init__(self, stream: IterableDataset, argument: str, most: int | None) -> None:
        self._rows, self._argument, self._most = iter(stream), argument, most
        self._tables: list[Dataset] = []
        self._read(most)
        if not self._tables:
            raise LoptError(f"{argument} has no rows; give data with a row or more")

    @property
    def rows(self) -> Dataset:
        """Those that have been read."""
        return datasets.concatenate_datasets(self._tables)

    def read_for(self, num_usable: int, why: str = "") -> bool:
        """Reads on where fewer rows than the run needs can be used, so that none comes twice for want of others.

        It goes by the share that can be used, and at most doubles their number: all processes read the same.

        Args:
            num_usable: of the rows so far.
            why: none of them can be used, for the message where it gives up.

        Returns:
            Whether there are more now.

        Raises:
            LoptError: hardly any can be used, or the stream cannot be read.
        """
        before = sum(map(len, self._tables))
        if self._most is None or num_usable >= self._most:
            return False
        if before > _PER_TABLE + _TIMES_BEFORE_AN_END * self._most:
            raise LoptError(
                f"{self._argument}: only {num_usable} of its first {before} rows can be used, and the run needs "
                f"{self._most}; {why or 'check the rows, or give a smaller max_steps'}"
            )
        self._read(min(before, math.ceil((self._most - num_usable) * before / max(num_usable, 1))))
        return sum(map(len, self._tables)) > before

    def _read(self, number: int | None) -> None:
        try:
            while batch := list(
                itertools.islice(self._rows, min(_PER_TABLE, _PER_TABLE if number is None else number))
            ):
                self._tables.append(as_dataset(batch, self._argument))
                if number is None and len(self._tables) == _TABLES_BEFORE_A_WARNING:
                    logger.warning(
                        "%s: %d rows are read, and it goes on; it must end, or max_steps say how many are wanted, "
                        "without packing",
                        self._argument,
                        sum(map(len, self._tables)),
                    )
                number = None if number is None else number - len(batch)
        except LoptError:
            raise
        except Exception as error:  # Whatever the user's generator, or the network behind it, may raise.
            raise LoptError(f"{self._argument} cannot be read: {describe(error)}") from error

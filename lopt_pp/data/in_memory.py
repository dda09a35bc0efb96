"""Rows that a script holds in memory: data sets of `datasets`, finite streams of them, and lists of dicts.

They become the same `RawRows` that files become, and go the same way from there.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.fingerprint import Hasher

from lopt_pp.data.formats import Format, Reader, Row, Text, read_row
from lopt_pp.data.given_stream import GivenStream
from lopt_pp.data.raw_rows import RawRows
from lopt_pp.data.table_files import TableRows, as_dataset
from lopt_pp.errors import LoptError, first_line, shown
from lopt_pp.util.user_code import describe

AnyRows: TypeAlias = Dataset | IterableDataset | Sequence[Mapping[str, Any]]
"""What a script may give: a data set, a stream that ends, or a list of dicts."""

Formatting = Callable[[dict[str, Any]], str]
"""TRL's `formatting_func`: makes the text to train on of a row."""

TRAIN = "train_dataset"
"""What messages call the rows to train on."""

_SET_NAME = re.compile(r"[A-Za-z]\w*")
"""As `--eval_file` has names."""


@dataclass(frozen=True)
class GivenSource:
    """What a script says of some rows, in place of what flags say.

    Attributes:
        rows: likewise; None where flags name them.
        formatting_func: makes texts of them; None where their columns, or flags, say what they are.
    """

    rows: RawRows | None = None
    formatting_func: Formatting | None = None


NO_SOURCE = GivenSource()


@dataclass(frozen=True)
class GivenRows:
    """The rows of a run that are given as objects, and not named by its flags.

    Attributes:
        train: to train on; None where flags name them.
        held_out: to evaluate on, by the names of the sets; none where flags name them, or there are none.
        formatting_func: makes texts of all rows, also of those that flags name.
        stream: that those to train on are of; None where they are of none.
    """

    train: RawRows | None = None
    held_out: Mapping[str, RawRows] = field(default_factory=dict)
    formatting_func: Formatting | None = None
    stream: GivenStream | None = None

    def as_read(self) -> "GivenRows":
        """With all rows that have been read of the stream, where there is one."""
        return self if self.stream is None else replace(self, train=raw_rows(self.stream, TRAIN))

    def read_for(self, num_usable: int, why: str = "") -> bool:
        """Whether there are more rows of a stream now, since too few could be used; see `GivenStream.read_for`."""
        return self.stream is not None and self.stream.read_for(num_usable, why)

    def source(self, rows: RawRows | None = None) -> GivenSource:
        """Of rows of a script; None for those that flags name."""
        return GivenSource(rows, self.formatting_func)


NO_GIVEN_ROWS = GivenRows()


def training_rows(rows: AnyRows | None, most: int | None, formatting_func: Formatting | None = None) -> GivenRows:
    """The rows to train on that a script gives.

    Args:
        rows: a `Dataset`; an `IterableDataset`, of which rows are read now; or dicts; None where flags name them.
        most: rows that the run can use; None for all.
        formatting_func: makes texts of them.

    Raises:
        LoptError: they are something else, or cannot be read.
    """
    stream = GivenStream(rows, TRAIN, most) if isinstance(rows, IterableDataset) else None
    train = None if rows is None else raw_rows(stream or rows, TRAIN)
    return GivenRows(train, formatting_func=formatting_func, stream=stream)


def raw_rows(rows: AnyRows | GivenStream, argument: str) -> RawRows:
    """The rows that a script gives.

    Args:
        rows: a `Dataset`; an `IterableDataset`, of which all rows are read now; or dicts.
        argument: what they are called, in messages.

    Raises:
        LoptError: they are something else, or cannot be read.
    """
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise LoptError(f"{argument} is a {type(rows).__name__} with the splits {', '.join(rows)}; give one of them")
    if isinstance(rows, IterableDataset):
        rows = GivenStream(rows, argument, None)
    if isinstance(rows, GivenStream):
        rows = rows.rows
    if not isinstance(rows, Dataset):
        rows = _from_dicts(rows, argument)
    if rows.format["type"] == "custom":
        raise LoptError(
            f"{argument} has a transform (set_transform), which would be passed over; apply it by map() and give that"
        )
    # Those of memory go by what they hold: what `datasets` names them by differs from process to process at times.
    digest = None if rows.cache_files else _digest(rows)
    return RawRows([TableRows(rows, argument, digest)], argument)


def sets_of(rows: AnyRows | Mapping[str, AnyRows] | None) -> Mapping[str, AnyRows]:
    """Sets of rows to evaluate on, by their names; the name of the only one may be empty.

    Raises:
        LoptError: one of several has a name that metrics cannot have.
    """
    if rows is None:
        return {}
    if isinstance(rows, Mapping):  # A DatasetDict, too.
        names = [str(name) for name in rows]
        unusable = [name for name in names if not _SET_NAME.fullmatch(name)]
        if unusable and len(names) > 1:
            raise LoptError(f"eval_dataset: {shown(unusable[0])} is not a name: a letter, then letters, digits and _")
        return dict(zip(names, rows.values(), strict=True))
    return {"": rows}


def rows_of(sets: Mapping[str, AnyRows]) -> dict[str, RawRows]:
    """Those of each set of rows to evaluate on.

    Raises:
        LoptError: they cannot be read.
    """
    return {name: raw_rows(own, f"eval_dataset {name}".strip()) for name, own in sets.items()}


def _from_dicts(rows: object, argument: str) -> Dataset:
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable) or hasattr(rows, "columns"):
        such = f": Dataset.from_pandas({argument})" if type(rows).__module__.startswith("pandas") else ""
        raise LoptError(
            f"{argument} is a {type(rows).__name__}; give a datasets.Dataset{such}, an IterableDataset or a list of "
            f"dicts"
        )
    listed = list(rows)
    for number, row in enumerate(listed, 1):
        if not isinstance(row, Mapping):
            raise LoptError(f"{argument}: row {number} is {shown(row)}; give dicts")
    return as_dataset(listed, argument)


def _digest(rows: Dataset) -> str:
    """The SHA-256, in hex, of what a table holds."""
    sha = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table.combine_chunks())
        sha.update(sink.getvalue())
    return sha.hexdigest()


def formatted(formatting: Formatting) -> Reader:
    """A reader that has `formatting_func` make a text of each row; rows that are tokens stay as they are, as in TRL.

    Raises:
        LoptError: the function cannot be pickled, so that no cache could go by it.
    """
    try:
        Hasher.hash(formatting)
    except Exception as error:  # Of what it closes over, which may be anything.
        raise LoptError(
            f"formatting_func cannot be pickled, as it must be for the cache of tokenized rows ({first_line(error)}); "
            f"let it use no open files, locks or connections"
        ) from error
    return functools.partial(_formatted, formatting=formatting)


def _formatted(row: Row, formatting: Formatting) -> Format | None:
    if row.get("input_ids") is not None:
        return read_row(row)
    try:
        text = formatting(dict(row))
    except Exception as error:  # Whatever the user's function may raise.
        raise LoptError(f"formatting_func fails: {describe(error)}") from error
    if not isinstance(text, str):
        raise LoptError(f"formatting_func returns {shown(text)}; let it return one string for a row")
    return Text(text)

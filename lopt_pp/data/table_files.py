"""Rows in tables of Arrow: of Parquet and Arrow files, and of data sets that `datasets` has loaded or saved."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from lopt_pp.data.cache import made_once
from lopt_pp.data.text_files import Places
from lopt_pp.errors import LoptError, first_line
from lopt_pp.util.compat_datasets import fingerprint

_BATCH = 1000

TABLE_ERRORS = (OSError, ValueError, TypeError, LookupError, RuntimeError, pa.ArrowException)
"""What reading a damaged table raises."""


class TableRows:
    """The rows of a table that is mapped from disk.

    Args:
        dataset: the table.
        name: of it, for messages.
        digest: what others than these rows have another one of; by default it is taken from the table's files.
        is_whole: whether the table is all that is in its files.
    """

    def __init__(self, dataset: Dataset, name: str, digest: str | None = None, is_whole: bool = False) -> None:
        self.name = name
        self._is_whole = is_whole
        self._dataset = dataset.with_format(None)
        if digest is not None:
            self.digest = digest

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of the bytes of its files, and of what `datasets` has done to them."""
        sha = hashlib.sha256(b"" if self._is_whole else fingerprint(self._dataset).encode())
        for file in self._dataset.cache_files:
            sha.update(digest_of(Path(file["filename"])).encode())
        return sha.hexdigest()

    def find(self) -> Places:
        """The numbers of the rows."""
        numbers = np.arange(len(self._dataset) + 1, dtype=np.int64)
        return Places(numbers[:-1], numbers[1:])

    def read(self, starts: Sequence[int], stops: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows at these places.

        Raises:
            LoptError: a value in them cannot be read.
        """
        in_a_row = stops[-1] - starts[0] == len(starts)
        try:
            columns = self._dataset[starts[0] : stops[-1]] if in_a_row else self._dataset[list(starts)]
        except TABLE_ERRORS as error:
            if len(starts) == 1:
                raise LoptError(f"the table cannot be read there: {first_line(error)}") from error
            for pair in zip(starts, stops, strict=True):  # Up to the row that it is.
                yield from self.read(pair[:1], pair[1:])
            return
        for number in range(len(starts)):
            yield {column: values[number] for column, values in columns.items()}

    def row_name(self, number: int, start: int) -> str:
        """What a message calls a row: its number (from 1) and its table."""
        return f"row {number + 1} of {self.name}"


def open_parquet(path: Path, name: str) -> TableRows:
    """The rows of a Parquet file, which is made an Arrow file of the cache first: that gives single rows fast."""
    digest = digest_of(path)

    def convert(unpacked: Path) -> None:
        with pq.ParquetFile(path) as file, pa.ipc.new_stream(str(unpacked), file.schema_arrow) as stream:
            for batch in file.iter_batches(_BATCH):
                stream.write_batch(batch)

    return TableRows(Dataset.from_file(str(made_once(f"{digest}.arrow", convert))), name, digest)


def open_arrow(path: Path, name: str) -> TableRows:
    """The rows of an Arrow file, of the kind for streams (as `datasets` writes) or the kind for random access."""
    digest = digest_of(path)
    try:
        pa.ipc.open_stream(str(path)).close()
        stream = path
    except pa.ArrowInvalid:
        stream = made_once(f"{digest}.arrow", lambda unpacked: _as_stream(path, unpacked))
    dataset = Dataset.from_file(str(stream))
    dataset.data.table.validate(full=True)  # What is damaged would end the process when it is read.
    return TableRows(dataset, name, digest)


def _as_stream(path: Path, unpacked: Path) -> None:
    with (
        pa.memory_map(str(path)) as mapped,
        pa.ipc.open_file(mapped) as file,
        pa.ipc.new_stream(str(unpacked), file.schema) as stream,
    ):
        for number in range(file.num_record_batches):
            stream.write_batch(file.get_batch(number))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_dataset(rows: Sequence[Mapping[str, Any]], called: str) -> Dataset:
    """A table of dicts; a column that only some of them have is None in the others, as in a file.

    Raises:
        LoptError: they do not make a table; `called` is what messages call them.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except TABLE_ERRORS as error:
        raise LoptError(f"{called}: its rows do not make a table: {first_line(error)}") from error

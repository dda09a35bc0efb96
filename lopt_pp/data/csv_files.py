"""Rows in CSV. Nothing is guessed: all cells are text, whatever they look like, and an empty one is None."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopt_pp.data.cache import made_once
from lopt_pp.data.text_files import Places, TextFile, decoded
from lopt_pp.errors import LoptError

csv.field_size_limit(sys.maxsize)  # Python refuses cells of more than 131,072 characters otherwise.


class CsvFile(TextFile):
    """A header and records, parted by commas. A record may have fewer cells than the header; the rest is None then."""

    def find(self) -> Places:
        records = Places.load(made_once(f"{self.digest}-csv.places", self._scan))
        if not len(records):
            self.fail("it has no header; give it one, and a row or more")
        self._columns = self._read_header(self.bytes_between(int(records.starts[0]), int(records.stops[0])))
        return Places(records.starts[1:], records.stops[1:])

    def _read_header(self, content: bytes) -> list[str]:
        try:
            columns = _cells(content)
        except LoptError as error:
            self.fail(f"of its header, {error}")
        for column in columns:
            if column and columns.count(column) > 1:
                self.fail(f"its header has the column {column} twice; give each its own name")
        return [column or f"Unnamed: {number}" for number, column in enumerate(columns)]

    def _scan(self, path: Path) -> None:
        """Writes to a file where header and records are.

        The file is taken for Latin-1, in which each byte is a character: CSV's own marks are the same there.
        """
        size, start, record, last = 0, 0, "", ""
        found: list[tuple[int, int]] = []

        def counted(lines: io.TextIOWrapper) -> Iterator[str]:
            nonlocal size, record
            for line in lines:
                size += len(line)
                record += line
                yield line

        with self.path.open(encoding="latin-1", newline="") as lines:
            for _ in csv.reader(counted(lines)):
                if record.strip(" \t\r\n"):
                    found.append((start, size))
                    last = record
                start, record = size, ""
        try:
            list(csv.reader(io.StringIO(last, newline=""), strict=True))
        except csv.Error as error:
            if "end of data" in str(error):
                name = self.row_name(len(found) - 2, found[-1][0])
                raise LoptError(f"{name}: a quote opens in it that is never closed; is the file cut off?") from error
        Places.of(found).save(path)

    def _parse(self, content: bytes) -> dict[str, Any]:
        cells = _cells(content)
        if len(cells) > len(self._columns):
            raise LoptError(f"it has {len(cells)} cells, and the header has {len(self._columns)}; quote commas in text")
        cells += [""] * (len(self._columns) - len(cells))
        return {column: cell or None for column, cell in zip(self._columns, cells, strict=True)}


def _cells(content: bytes) -> list[str]:
    return next(csv.reader(io.StringIO(decoded(content), newline="")), [])

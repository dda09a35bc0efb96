"""Files of text whose rows are read where they are."""

import codecs
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lopt_pp.errors import LoptError, first_line

_CHUNK = 1 << 26
_OPEN_FILES = 64

_MAGIC = {
    b"\x1f\x8b": "it is compressed by gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "it is compressed by zstd; let its name end in .zst",
    b"BZh": "it is compressed by bzip2; let its name end in .bz2",
    b"\xfd7zXZ\x00": "it is compressed by xz; let its name end in .xz",
    b"PK\x03\x04": "it is a ZIP archive; unpack it",
    b"PAR1": "it is a Parquet file; let its name end in .parquet",
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`",
    codecs.BOM_UTF16_LE: "it is UTF-16; save it as UTF-8",
    codecs.BOM_UTF16_BE: "it is UTF-16; save it as UTF-8",
}
"""How files begin that are not text in UTF-8, and what to do with them."""


@dataclass(frozen=True)
class Places:
    """Where the rows of a file are.

    Attributes:
        starts: int64 [rows], in bytes from the file's start; of a table, the number of the row.
        stops: int64 [rows], behind the last byte of each.
    """

    starts: np.ndarray
    stops: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    @staticmethod
    def of(pairs: Sequence[tuple[int, int]]) -> "Places":
        """From the start and the stop of each row."""
        starts, stops = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return Places(starts, stops)

    @staticmethod
    def load(path: Path) -> "Places":
        """From a file that `save` has written."""
        starts, stops = np.fromfile(path, np.int64).reshape(2, -1)
        return Places(starts, stops)

    def save(self, path: Path) -> None:
        """Writes them to a file of the cache."""
        np.stack([self.starts, self.stops]).tofile(path)


class TextFile(ABC):
    """A file of rows in UTF-8, each a stretch of it. What comes of a stretch is for the subclasses to say.

    Attributes:
        path: of the file.
        name: what messages call it.

    Args:
        path: of the file.
        name: what messages call it, where that is not `path`.

    Raises:
        LoptError: the file cannot be read, or its first bytes say that it is something else.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        try:
            status = path.stat()
            with path.open("rb") as file:
                head = file.read(64)
        except OSError as error:
            self.fail(error.strerror or first_line(error))
        self._seen = status.st_size, status.st_mtime_ns
        for magic, said in _MAGIC.items():
            if head.startswith(magic):
                self.fail(said)
        if b"\0" in head[:2]:
            self.fail("it is UTF-16, or not a text; save it as UTF-8")

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the file's bytes, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @abstractmethod
    def find(self) -> Places:
        """Where the rows are; the file is read once for it.

        Raises:
            LoptError: the file is not of the format that its name says.
        """

    def read(self, starts: Sequence[int], stops: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows at these places.

        Raises:
            LoptError: one of them is malformed, or the file has changed since it was opened first.
        """
        first, last = starts[0], stops[-1]
        if 0 < last - first < _CHUNK and last - first <= 2 * (sum(stops) - sum(starts)):
            content = self.bytes_between(first, last)  # They follow each other: one read for all.
            for start, stop in zip(starts, stops, strict=True):
                yield self._parse(content[start - first : stop - first])
            return
        for start, stop in zip(starts, stops, strict=True):
            yield self._parse(self.bytes_between(start, stop))

    def row_name(self, number: int, start: int) -> str:
        """What a message calls a row: its number (from 1) and its file, and its line where blank lines come before."""
        said = f"row {number + 1} of {self.name}"
        try:
            line = 1 + sum(chunk.count(b"\n") for chunk in self.chunks(start))
        except OSError:  # It may be what the message is about that the file is gone.
            return said
        return f"{said} (line {line})" if line > number + 1 else said

    @abstractmethod
    def _parse(self, content: bytes) -> dict[str, Any]:
        """A row, of its stretch of the file.

        Raises:
            LoptError: it is malformed.
        """

    def bytes_between(self, start: int, stop: int) -> bytes:
        """The bytes of a stretch of the file.

        Raises:
            LoptError: the file has changed since it was opened first.
        """
        # Not mapped into memory: a file that is cut off meanwhile would then kill the process.
        file = _opened(self.path, self._seen)
        pieces = []
        while start < stop and (piece := os.pread(file.descriptor, stop - start, start)):
            pieces.append(piece)
            start += len(piece)
        if start < stop or file.has_changed():
            raise LoptError("the file has changed since the run began to read it; leave it as it is during a run")
        return b"".join(pieces)

    def chunks(self, stop: int | None = None) -> Iterator[bytes]:
        """The bytes of the file, or those before a place, a piece at a time."""
        stop = self._seen[0] if stop is None else stop
        with self.path.open("rb") as file:
            while (place := file.tell()) < stop and (chunk := file.read(min(_CHUNK, stop - place))):
                yield chunk

    def fail(self, why: str) -> NoReturn:
        """Says why the file cannot be read."""
        raise LoptError(f"--train_file {self.name} cannot be read: {why}")


def decoded(content: bytes) -> str:
    """The text of a stretch of a file, without a byte order mark.

    Raises:
        LoptError: it is not UTF-8.
    """
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise LoptError(
            f"it is not UTF-8 ({error.reason}: 0x{content[error.start]:02x}); save the file as UTF-8"
        ) from error


class _Opened:
    """An open file, until nothing refers to it."""

    def __init__(self, path: Path, seen: tuple[int, int]) -> None:
        self._seen = seen
        self.descriptor = os.open(path, os.O_RDONLY)

    def has_changed(self) -> bool:
        status = os.fstat(self.descriptor)
        return (status.st_size, status.st_mtime_ns) != self._seen

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(_OPEN_FILES)
def _opened(path: Path, seen: tuple[int, int]) -> _Opened:
    try:
        return _Opened(path, seen)
    except OSError as error:
        raise LoptError(f"the file can no longer be opened: {error.strerror}") from error

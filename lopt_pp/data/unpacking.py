"""Compressed files, unpacked into the cache."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from lopt_pp.data.cache import made_once
from lopt_pp.data.table_files import digest_of
from lopt_pp.errors import LoptError, first_line

_CHUNK = 1 << 20

_OPEN: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.input_stream(str(path), compression="zstd"),
}
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)


def unpacked(path: Path) -> Path:
    """The file itself, or of a compressed one what is in it, in the cache.

    Raises:
        LoptError: it is damaged, or cut off.
    """
    suffix = path.suffix.lower()
    if suffix not in _OPEN:
        return path

    def unpack(target: Path) -> None:
        with target.open("wb") as file:
            for chunk in _content(path, _OPEN[suffix]):
                file.write(chunk)

    return made_once(f"{digest_of(path)}{path.with_suffix('').suffix.lower()}", unpack)


def _content(path: Path, opened: Callable[..., Any]) -> Iterator[bytes]:
    try:
        with opened(path) as source:
            while chunk := source.read(_CHUNK):
                yield chunk
    except _DAMAGED as error:
        raise LoptError(
            f"--train_file {path} cannot be read: it is damaged or cut off ({first_line(error)}); copy it again"
        ) from error

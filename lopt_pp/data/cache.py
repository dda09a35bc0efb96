"""What is made of a file once, and found again by whoever has a file with the same content."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from lopt_pp.errors import LoptError

_VERSION = 1
"""To be raised where something else is made of the same content."""

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def cache_folder() -> Path:
    """Where it is kept: beside the caches of `datasets`."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lopt_pp"
    with cache_errors_named():
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def cache_errors_named() -> Iterator[None]:
    """Turns an error of writing to the cache into one that says where it is, and how to move it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_WRITING:  # Of reading what is to be cached.
            raise
        raise LoptError(
            f"the cache of tokenized rows in {datasets.config.HF_DATASETS_CACHE} cannot be written: {error.strerror}; "
            f"set HF_DATASETS_CACHE to a directory with room for it"
        ) from error


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A file of the cache, made if it is not there: whole or not at all, however many processes make it at once.

    Args:
        name: that goes by the content that the file is made of.
        make: writes it to the path that it is given.
    """
    path = cache_folder() / f"{_VERSION}-{name}"
    if path.exists():
        return path
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with cache_errors_named():
            make(unfinished)
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path

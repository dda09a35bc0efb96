"""What is made of a file once, and found again by whoever has a file with the same content."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import datasets


def cache_folder() -> Path:
    """Where it is kept: beside the caches of `datasets`."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lopt_pp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A file of the cache, made if it is not there: whole or not at all, however many processes make it at once.

    Args:
        name: that goes by the content that the file is made of.
        make: writes it to the path that it is given.
    """
    path = cache_folder() / name
    if path.exists():
        return path
    unfinished = path.with_name(f".{name}.{uuid.uuid4().hex}")
    try:
        make(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path

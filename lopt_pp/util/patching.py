"""Puts something else in the place of a library's function, for a while. For the files `compat_*.py` alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ABSENT = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives a module, a class or an object another attribute, and puts the old one back when the context ends.

    Raises:
        AttributeError: there is none of this name: the library has changed, and another one would change nothing.
    """
    getattr(owner, name)
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:  # It was the class's, or is found in some other way.
            delattr(owner, name)
        else:
            setattr(owner, name, before)

"""The errors that a user is meant to read."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager


class LoptError(Exception):
    """A mistake in what the user gave, or a run that cannot go on; its text says what is at fault and what to do.

    Programs print it as one line on standard error and leave with a status other than zero, without a traceback.
    """


class UsageError(LoptError):
    """A mistake in the flags, or in what they name. A command ends with status 2; with 1 at other errors."""


@contextmanager
def as_usage_errors() -> Iterator[None]:
    """Makes every `LoptError` a mistake in the flags: for a command whose status 1 says something else."""
    try:
        yield
    except LoptError as error:
        raise UsageError(str(error)) from error


class NotFiniteError(LoptError):
    """A loss or a gradient that is not finite. The stage's weights are those of the last good step.

    Attributes:
        keeps_weights: whether all stages are to save these weights before the run ends.
    """

    def __init__(self, message: str, keeps_weights: bool = False) -> None:
        super().__init__(message)
        self.keeps_weights = keeps_weights


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none: for quoting it in a `LoptError`."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def renamed_in_errors(inner: str, given: str) -> Iterator[None]:
    """Lets errors that name a flag or a path `inner` name what the user has `given` instead."""
    try:
        yield
    except LoptError as error:
        raise LoptError(str(error).replace(inner, given)) from error


def shown(value: object) -> str:
    """A value as Python writes it, for quoting it in a `LoptError`: short, whatever somebody has put into a file.

    `repr` would not do: YAML's aliases make a few lines a value of terabytes, lists may lie deeper in each other than
    Python's stack is, and numbers of thousands of digits are refused.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 2**64 else "a number of more than 64 bits"


_SHORT = _Short()


class StreamError(LoptError):
    """The neighbour at the other end of a boundary died, hangs, or disagrees about what comes next."""


def shown_with_type(value: object) -> str:
    """A value as it is shown in messages, and its type."""
    return f"{shown(value)} ({type(value).__name__})"

"""The errors that a user is meant to read."""

from collections.abc import Iterator
from contextlib import contextmanager


class LoptError(Exception):
    """A mistake in what the user gave, or a run that cannot go on; its text says what is at fault and what to do.

    Programs print it as one line on standard error and leave with a status other than zero, without a traceback.
    """


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

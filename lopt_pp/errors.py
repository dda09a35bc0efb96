"""The errors that a user is meant to read."""


class LoptError(Exception):
    """A mistake in what the user gave, or a run that cannot go on; its text says what is at fault and what to do.

    Programs print it as one line on standard error and leave with a status other than zero, without a traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none: for quoting it in a `LoptError`."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

"""What a user reads on standard error."""

import sys


def print_note(message: str) -> None:
    """Tells the user what the program does next: one line on standard error."""
    print(f"lopt-pp: {message}", file=sys.stderr, flush=True)


def print_error(message: str) -> None:
    """Tells the user why the program stops: one line on standard error."""
    print(f"lopt-pp: error: {message}", file=sys.stderr, flush=True)


def print_warning(message: str) -> None:
    """Tells the user of something that the program goes on with: one line on standard error."""
    print(f"lopt-pp: warning: {message}", file=sys.stderr, flush=True)

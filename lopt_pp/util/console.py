"""What a user reads on standard error."""

import sys

from lopt_pp.util.screen import CLEAR, is_terminal


def print_note(message: str) -> None:
    """Tells the user what the program does next: one line on standard error."""
    _print(f"lopt-pp: {message}")


def print_error(message: str) -> None:
    """Tells the user why the program stops: one line on standard error."""
    _print(f"lopt-pp: error: {message}")


def print_warning(message: str) -> None:
    """Tells the user of something that the program goes on with: one line on standard error."""
    _print(f"lopt-pp: warning: {message}")


def _print(line: str) -> None:
    # A process that has ended may have left its progress bar behind.
    print(f"{CLEAR if is_terminal(sys.stderr) else ''}{line}\n", end="", file=sys.stderr, flush=True)

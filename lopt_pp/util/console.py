"""What a user reads on standard error."""

import sys
from contextlib import suppress
from pathlib import Path

from lopt_pp.util.screen import CLEAR, is_terminal

_errors_file: Path | None = None


def print_note(message: str) -> None:
    """Tells the user what the program does next: one line on standard error."""
    _print(f"lopt-pp: {message}")


def print_error(message: str) -> None:
    """Tells the user why the program stops: one line on standard error, or to whom `write_errors_to` says."""
    if _errors_file is None:
        _print(f"lopt-pp: error: {message}")
    else:
        with _errors_file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{message}\n")


def write_errors_to(path: Path | None) -> None:
    """Has `print_error` write to a file from here on, for somebody who raises what it says; None undoes it."""
    global _errors_file
    _errors_file = path


def print_warning(message: str) -> None:
    """Tells the user of something that the program goes on with: one line on standard error."""
    _print(f"lopt-pp: warning: {message}")


def _print(line: str) -> None:
    # A process that has ended may have left its progress bar behind.
    with suppress(OSError):  # Where nobody can read it, the program does its work all the same.
        print(f"{CLEAR if is_terminal(sys.stderr) else ''}{line}\n", end="", file=sys.stderr, flush=True)

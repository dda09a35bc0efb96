"""What a user reads on standard error."""

import os
import sys
from pathlib import Path

from lopt_pp.util.screen import CLEAR, is_terminal, put

_errors_file: Path | None = None


def open_streams() -> None:
    """Opens the standard streams that a shell has closed (`>&-`) where nothing is, for this process and its children.

    Python has None in their place then, and the first file that somebody opens would get their output. `sys.stdin`
    stays None, which says that there is nobody to ask.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        opened = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
        if opened == number:  # The lowest that is free.
            os.set_inheritable(number, True)
        if number > 0:
            setattr(sys, name, os.fdopen(opened, "w"))
        elif opened != number:  # Only Python has none.
            os.close(opened)


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
    # Where nobody can read it, the program does its work all the same.
    if sys.stderr is not None:
        put(sys.stderr, f"{CLEAR if is_terminal(sys.stderr) else ''}{line}\n")

"""What a user reads on standard error."""

import sys


def print_error(message: str) -> None:
    """Tells the user why the program stops: one line on standard error."""
    print(f"lopt-pp: error: {message}", file=sys.stderr, flush=True)

"""What is seen on a terminal, by a terminal emulator."""

import pyte


def emulated(shown: str, columns: int = 80) -> list[str]:
    """The rows of a terminal that has shown all this, as high as it takes, without spaces at their ends."""
    screen = pyte.Screen(columns, shown.count("\n") + 100)
    pyte.Stream(screen).feed(shown)
    return [row.rstrip() for row in screen.display]

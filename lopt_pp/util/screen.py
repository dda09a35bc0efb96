"""A terminal that several processes write to at the same time, with a progress bar on its last row.

Nothing tears, since everything is written in whole: a line with one call, after what clears the row that the cursor is
in, and a bar with one call and without the end of a line. So a line of another process takes the place of the bar,
which is drawn again below it: at once where the line is this process's own, else with the next tick. Where there is no
terminal, streams stay as they are, and there is no bar. One that is closed meanwhile is written to no more.
"""

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

CLEAR = "\r\x1b[K"
"""To the row's beginning, and nothing behind."""

_TICK = 0.5
"""Seconds in which a bar that another process has written over is there again."""


class Screen:
    """What this process writes to its terminal: lines, and at most one bar below them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._render: Callable[[int], str] | None = None
        self._to: TextIO = sys.stderr
        self._open_line: object = None
        """Who has written the beginning of a line, such as a question, whose end is still to come."""

    def write(self, stream: TextIO, text: str, writer: object) -> None:
        """Writes whole lines above the bar.

        Args:
            stream: to write to.
            text: the lines, with their ends.
            writer: who may have written the beginning of the first one.
        """
        with self._lock:
            begun = self._open_line is writer
            self._open_line = None if begun else self._open_line
            self._put(stream, text if begun else CLEAR + text)
            self._draw()

    def write_beginning(self, stream: TextIO, text: str, writer: object) -> None:
        """Writes the beginning of a line, or more of it; there is no bar until its end."""
        with self._lock:
            self._put(stream, text if self._open_line is writer else CLEAR + text)
            self._open_line = writer

    @contextmanager
    def bar(self, render: Callable[[int], str], end: str = "\n") -> Iterator[Callable[[], None]]:
        """Shows a bar on standard error while the context lasts, if that is a terminal.

        Args:
            render: gives the bar, for a number of columns that it may have; called from a thread as well.
            end: written behind it in the end.

        Returns:
            A context of what draws it again, as it has changed.
        """
        stream = sys.stderr.stream if isinstance(sys.stderr, _Lines) else sys.stderr
        if not is_terminal(stream):
            yield lambda: None
            return
        over = threading.Event()
        with self._lock:
            self._to, self._render = stream, render

        def tick() -> None:
            while not over.wait(_TICK):
                self.draw()

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        self.draw()
        try:
            yield self.draw
        finally:
            over.set()
            ticking.join()
            with self._lock:
                self._draw()
                self._render = None
                self._put(stream, end)

    def draw(self) -> None:
        """Draws the bar again, where there is one."""
        with self._lock:
            self._draw()

    def _draw(self) -> None:
        if self._render is not None and self._open_line is None:
            # One column is left, since a full row would move the cursor to the next.
            self._put(self._to, f"\r{self._render(_columns(self._to) - 1)}\x1b[K")

    def _put(self, stream: TextIO, text: str) -> None:
        """Has a terminal show a text at once; where it has been closed, there is no bar from then on."""
        if not put(stream, text) and stream is self._to:
            self._render = None


def put(stream: TextIO, text: str) -> bool:
    """Writes to a terminal, if it is still there, and returns whether it could.

    Nothing ends because somebody has closed a window. Whatever else this process writes there goes nowhere from then
    on: a `print` of a user's script, and Python's last flush, would fail as well.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno == errno.EIO:
            with suppress(OSError):
                _let_go(stream.fileno())
        return isinstance(error, BlockingIOError)  # A terminal that takes no more at the moment has not gone.
    return True


def _let_go(terminal: int) -> None:
    """Has this process's outputs to a terminal that has gone lead nowhere."""
    device = os.fstat(terminal).st_rdev
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in {1, 2, terminal}:
        with suppress(OSError):  # Closed.
            if device and os.fstat(number).st_rdev == device:
                os.dup2(nowhere, number)
    os.close(nowhere)


SCREEN = Screen()
"""That of this process."""


class _Lines:
    """A stream in front of another one, which gets whole lines, each with one call."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._rest = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            lines, end, self._rest = (self._rest + text).rpartition("\n")
            if end:
                SCREEN.write(self.stream, lines + end, self)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._lock:
            if self._rest:
                rest, self._rest = self._rest, ""
                SCREEN.write_beginning(self.stream, rest, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def shared() -> Iterator[None]:
    """Has `print`, logging and whatever else writes to Python's standard streams leave bars whole while it lasts."""
    before = {"stdout": sys.stdout, "stderr": sys.stderr}
    own = {name: _Lines(stream) for name, stream in before.items() if is_terminal(stream)}
    own = {name: lines for name, lines in own.items() if not isinstance(before[name], _Lines)}
    for name, lines in own.items():
        setattr(sys, name, lines)
        _move_handlers(before[name], lines)
    try:
        yield
    finally:
        for name, lines in own.items():
            lines.flush()
            _move_handlers(lines, before[name])
            if getattr(sys, name) is lines:
                setattr(sys, name, before[name])


def _move_handlers(before: Any, after: Any) -> None:
    """Has logging write to another stream."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.Logger.manager.loggerDict))]
    for handler in {id(handler): handler for logger in loggers for handler in logger.handlers}.values():
        # That of logging's last resort asks for standard error each time.
        if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") is before:
            handler.setStream(after)


def is_terminal(stream: Any) -> bool:
    """Whether somebody looks at it, on a screen that understands control sequences, as far as one can know."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # There is none, or it is closed.
        return False


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80

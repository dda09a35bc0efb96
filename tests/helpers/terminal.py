"""Runs `lopt-pp` in a terminal of its own, as a user sees it and presses keys.

The program and the processes that it starts are forked from one that has imported the trainer already, so that a test
does not wait for PyTorch. Nothing else is different.
"""

import os
import pty
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from emulated import emulated
from ranks import context, fork_the_server, until

from lopt_pp import cli


class Terminal:
    """A terminal in which a program runs.

    Attributes:
        process: the program.
    """

    def __init__(self, words: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> None:
        self._keyboard, screen = pty.openpty()
        given = (os.ttyname(screen), list(words), cwd, dict(environment))
        self.process = context.Process(target=_run, args=given)
        self.process.start()
        self._shown = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._screen = screen

    def _read(self) -> None:
        with suppress(OSError):  # What a terminal answers that nobody writes to any more.
            while part := os.read(self._keyboard, 65536):
                self._shown += part

    @property
    def lines(self) -> list[str]:
        """What is seen, without empty lines."""
        return [row for row in emulated(self._shown.decode(), columns=500) if row]

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Waits until it is shown."""
        until(lambda: text in self._shown.decode() or not self.process.is_alive(), seconds)
        assert text in self._shown.decode(), self.lines

    def wait_for_prompt(self, seconds: float = 120) -> None:
        """Waits until the last line is the prompt, and the program for a key: a signal is not noticed right before."""
        program = psutil.Process(self.process.pid)
        until(lambda: self.lines[-1:] == [">"] and program.status() == psutil.STATUS_SLEEPING, seconds)

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def press_ctrl_c(self) -> None:
        self.type("\x03")

    def status(self, seconds: float = 120) -> int | None:
        """Waits for the program's end, and for the last line; returns the exit status."""
        self.process.join(seconds)
        os.close(self._screen)
        self._reader.join(seconds)
        return self.process.exitcode


@contextmanager
def terminal(*words: object, cwd: Path, **environment: str) -> Iterator[Terminal]:
    """Runs `lopt-pp WORDS` in a terminal; it is killed at the end if it still runs.

    Args:
        words: of the command line.
        cwd: where it runs.
        environment: variables of this program and of those that it starts.
    """
    started = Terminal([*map(str, words)], cwd, environment)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.join()


def _run(tty: str, words: list[str], cwd: Path, environment: dict[str, str]) -> None:
    os.login_tty(os.open(tty, os.O_RDWR))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.stdin = os.fdopen(0)
    torch.set_num_threads(1)
    fork_the_server()
    sys.exit(cli.main(words))

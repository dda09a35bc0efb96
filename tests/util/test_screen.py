"""A terminal that two processes write to: what somebody sees there, by a terminal emulator."""

import io
import itertools
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from emulated import emulated
from launching import environment
from ranks import until

from lopt_pp.util.console import print_note
from lopt_pp.util.screen import CLEAR, SCREEN, is_terminal, shared

PROGRAM = Path(__file__).parent.parent / "helpers" / "on_a_screen.py"
NUM_LINES = 150


def run_on_a_terminal(commands: Sequence[Sequence[str]]) -> str:
    """What programs show that run at the same time on one terminal."""
    keyboard, terminal = pty.openpty()
    programs = [subprocess.Popen(command, stdout=terminal, stderr=terminal) for command in commands]
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(keyboard, 65536):
            shown += part
    except OSError:  # At the terminal's end.
        pass
    finally:
        os.close(keyboard)
    assert [program.wait() for program in programs] == [0] * len(programs), shown.decode()
    return shown.decode()


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """What is seen of a process with a bar and one without, which write as fast as they can."""
    command = [sys.executable, str(PROGRAM), str(NUM_LINES)]
    return [row for row in emulated(run_on_a_terminal([[*command, "0"], [*command, "1"]])) if row]


def test_no_line_of_two_processes_is_torn(rows: list[str]) -> None:
    written = itertools.product((0, 1), ("logs", "prints"), range(NUM_LINES))
    lines = [f"rank {rank} {how} {number}" for rank, how, number in written]
    assert sorted(rows) == sorted([*lines, f"bar {NUM_LINES}/{NUM_LINES} {'=' * 40}"])


def test_a_bar_is_left_whole_by_questions_and_long_texts() -> None:
    """The beginning of a line, such as a question, stays until its end, and the bar waits for it."""
    shown = run_on_a_terminal([[sys.executable, str(PROGRAM), "3", "ask"]])
    assert [row for row in emulated(shown) if row] == ["how many? 3", "first", "second", f"bar 3/3 {'=' * 40}"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In place of standard error; pytest sets that of its own before each test, after its fixtures."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_handlers_that_wrote_to_the_terminal_before_share_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    handler, other = logging.StreamHandler(), logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("of a user")
    logger.addHandler(handler)
    logger.addHandler(other)
    try:
        with shared(), SCREEN.bar(lambda columns: f"bar of {columns}"):
            logger.warning("a line")
            with shared():  # A run within a run, as in a test.
                print("another", file=sys.stderr)
        assert sys.stderr is stream and handler.stream is stream
    finally:
        logger.removeHandler(handler)
        logger.removeHandler(other)
    bar = "\rbar of 79\x1b[K"
    assert stream.getvalue() == f"{bar}{CLEAR}a line\n{bar}{CLEAR}another\n{bar}{bar}\n"


def test_without_a_terminal_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with shared(), SCREEN.bar(lambda columns: "bar") as draw:
        assert sys.stderr is stream
        print("a line", file=sys.stderr)
        draw()
    assert stream.getvalue() == "a line\n"
    assert not any(map(is_terminal, (stream, None, object())))
    stream.close()
    assert not is_terminal(stream)


def test_a_terminal_without_control_sequences_is_shown_lines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = pty.openpty()
    with os.fdopen(writes, "w") as stream:
        monkeypatch.setenv("TERM", "xterm")
        assert is_terminal(stream)
        monkeypatch.setenv("TERM", "dumb")
        assert not is_terminal(stream)
    os.close(reads)


def test_nothing_fails_of_a_terminal_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by closing its window; the process goes on, and may still write there."""
    reads, writes = pty.openpty()
    drawn: list[int] = []

    def render(columns: int) -> str:
        drawn.append(columns)
        return "bar"

    logger = logging.getLogger("of a run")
    with os.fdopen(writes, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        try:
            with shared(), SCREEN.bar(render) as draw:
                assert os.read(reads, 100)
                os.close(reads)
                draw()
                until_here = len(drawn)
                draw()
                logger.warning("a line")
                print("another", file=sys.stderr)
                assert len(drawn) == until_here
            print_note("the last one")
            print("by somebody else", file=sys.stderr, flush=True)
        finally:
            logger.removeHandler(handler)


def test_what_a_script_prints_afterwards_does_not_fail_either() -> None:
    """On standard output, which was the same terminal; nor does Python's last flush."""
    script = """\
import sys
from lopt_pp.util.screen import SCREEN, shared
with shared(), SCREEN.bar(lambda columns: "bar"):
    sys.stdin.read()
print("the result", flush=True)
"""
    reads, writes = pty.openpty()
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writes, stderr=writes, env=environment()) as program:
        os.close(writes)
        assert os.read(reads, 100)
        os.close(reads)
        program.communicate()
    assert program.returncode == 0


def test_the_bar_is_there_again_after_a_line_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    drawn = iter(range(1, 1000))
    with SCREEN.bar(lambda columns: f"bar {next(drawn)}"):
        until(lambda: "bar 2" in stream.getvalue())  # By itself.
    assert re.match(r"\rbar 1\x1b\[K\rbar 2", stream.getvalue())

"""What processes do that the tests of the launcher start: `ENTRY ARGUMENTS`."""

import os
import signal
import sys
import threading
import time
from pathlib import Path


def succeed(arguments: list[str]) -> int:
    """Prints what it was given, and what the launcher has put into its environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MORE")
    print(*arguments, *(f"{name}={os.environ.get(name)}" for name in names))
    return 0


def have_no_output(arguments: list[str]) -> int:
    """Ends well, with nowhere to print: closed in the first process, full in the others."""
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    sys.stdout = None if os.environ["RANK"] == "0" else full
    print("nobody reads this")
    return 0


def be_stopped(arguments: list[str]) -> int:
    return 75


def fail_in_second(arguments: list[str]) -> int:
    """The second process fails, or is killed where `kill` is given; the others wait for ever."""
    if os.environ["RANK"] == "1":
        if arguments == ["kill"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return 2
    threading.Event().wait()
    return 0


def fail_once(arguments: list[str]) -> int:
    """The first start of all fails."""
    print("start", os.environ["TORCHELASTIC_RESTART_COUNT"])
    return 3 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0


def await_signal(arguments: list[str]) -> int:
    """Ends in good order when a signal comes, which the first process has its launcher sent, if that is given.

    Args:
        arguments: a folder, then the launcher's process.
    """
    asked = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    folder = Path(arguments[0])
    (folder / f"ready-{os.environ['RANK']}").touch()
    if os.environ["RANK"] == "0" and arguments[1:]:
        while len(list(folder.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(int(arguments[1]), signal.SIGUSR1)
    asked.wait()
    return 75


def kill_server(arguments: list[str]) -> int:
    """Ends in good order when the process has gone that it was forked from.

    Args:
        arguments: a folder.
    """
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    os.kill(os.getppid(), signal.SIGKILL)
    asked.wait()
    (Path(arguments[0]) / "stopped").touch()
    return 75


def ignore_signals(arguments: list[str]) -> int:
    """Goes on when its launcher is gone, as a run that saves, and ends when the file `go-on` is there."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    folder = Path(arguments[0])
    unfinished = folder / "unfinished"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(folder / "ready")
    asked.wait()
    while not (folder / "go-on").exists():
        time.sleep(0.01)
    return 0

"""The server that processes are forked from, as it is started for a run in a terminal."""

import subprocess
import sys
from pathlib import Path

from launching import environment

PRELOADED = """\
import os, time
from pathlib import Path
Path("begun").touch()
while not Path("go-on").exists():
    time.sleep(0.01)
"""

LAUNCHER = """\
import multiprocessing, os, signal, time
from pathlib import Path
from lopt_pp.distributed.fork_server import leave_server, start_server

def hears(server):
    leave_server()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert os.getppid() == server

if __name__ == "__main__":
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGHUP)}
    start_server(1, ["preloaded"])
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    while not Path("begun").exists():
        time.sleep(0.01)
    for number in kept:
        os.killpg(0, number)
    Path("go-on").touch()
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    process = multiprocessing.get_context("forkserver").Process(target=hears, args=[server])
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""

EARLY = """\
import os, signal, sys, threading, time
from pathlib import Path
from lopt_pp.distributed.fork_server import start_server

def press_ctrl_c(thread):
    while sys._current_frames()[thread].f_code.co_name != "read_signed":
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    start_server(2, ["preloaded"])
    from lopt_pp.distributed.launch import Launchers, launch
    threading.Thread(target=press_ctrl_c, args=[threading.get_ident()]).start()
    outcome = launch("launched:succeed", [], Launchers(2), preload=["preloaded"])
    Path("go-on").touch()
    raise SystemExit(outcome.status)
"""
"""Ctrl-C while the launcher waits for the server, which imports, to fork the first process."""


def start(script: str, folder: Path) -> tuple[int, str, str]:
    """Runs a launcher until it and its server are gone; returns its exit status and what they have printed."""
    for name, text in {"preloaded": PRELOADED, "launcher": script}.items():
        (folder / f"{name}.py").write_text(text)
    variables = environment()
    variables["PYTHONPATH"] += f":{folder}"
    done = subprocess.run(
        [sys.executable, "launcher.py"],
        env=variables,
        cwd=folder,
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_and_a_closed_terminal_are_left_to_the_launcher(tmp_path: Path) -> None:
    """Also while the server imports; what is forked from it hears them."""
    assert start(LAUNCHER, tmp_path) == (0, "", "")


def test_a_launcher_that_ends_before_its_processes_begin_leaves_no_word(tmp_path: Path) -> None:
    """The server forked them afterwards, and they failed over a semaphore that had gone."""
    assert start(EARLY, tmp_path) == (130, "", "")

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


def test_ctrl_c_and_a_closed_terminal_are_left_to_the_launcher(tmp_path: Path) -> None:
    """Also while the server imports; what is forked from it hears them."""
    for name, text in {"preloaded": PRELOADED, "launcher": LAUNCHER}.items():
        (tmp_path / f"{name}.py").write_text(text)
    variables = environment()
    variables["PYTHONPATH"] += f":{tmp_path}"
    done = subprocess.run(
        [sys.executable, "launcher.py"],
        env=variables,
        cwd=tmp_path,
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""The launcher starts processes, hears how they end, and leaves none."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import environment
from ranks import until
from torch.distributed.elastic.multiprocessing import SignalException

from lopt_pp.distributed.deaths import first_deaths
from lopt_pp.distributed.launch import Launchers, Outcome, launch
from lopt_pp.distributed.signals import SignalForwarder
from lopt_pp.errors import LoptError


def run(entry: str, *arguments: str, logs: Path, restarts: int = 0, limit: float = 60) -> Outcome:
    given = Launchers(2, environment={"MORE": "more"})
    outcome = launch(f"launched:{entry}", arguments, given, logs=logs, max_restarts=restarts, time_limit=limit)
    assert not multiprocessing.active_children()
    return outcome


def test_each_process_knows_its_place(tmp_path: Path) -> None:
    outcome = run("succeed", "one's", "a$$b ${local_rank}", logs=tmp_path)
    assert outcome.statuses == {0: 0, 1: 0} and outcome.status == 0
    for rank in (0, 1):
        said = f"RANK={rank} WORLD_SIZE=2 LOCAL_RANK={rank} LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MORE=more\n"
        assert (tmp_path / f"rank-{rank}.log").read_text() == f"one's a$$b ${{local_rank}} {said}"


def test_output_that_cannot_be_written_is_not_a_failure(tmp_path: Path) -> None:
    assert run("have_no_output", logs=tmp_path).status == 0


def test_what_was_stopped_in_good_order_has_not_failed(tmp_path: Path) -> None:
    outcome = run("be_stopped", logs=tmp_path, restarts=1)
    assert outcome.statuses == {0: 75, 1: 75} and outcome.status == 75 and not outcome.failed


@pytest.mark.parametrize(("how", "failed", "status"), [("", 2, 2), ("kill", -signal.SIGKILL, 137)])
def test_one_that_fails_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str, failed: int, status: int
) -> None:
    outcome = run("fail_in_second", *how.split(), logs=tmp_path)
    assert outcome.failed == {1: failed} and outcome.status == status and outcome.statuses[0] is None
    assert ("rank 1 was ended by SIGKILL" in outcome.silent_death()) == (how == "kill")
    assert capfd.readouterr() == ("", ""), "what the agent says is not for the user"


def test_all_are_started_again(tmp_path: Path) -> None:
    outcome = run("fail_once", logs=tmp_path, restarts=1)
    assert outcome.statuses == {0: 0, 1: 0} and outcome.status == 0
    assert (tmp_path / "rank-0.log").read_text() == "start 0\nstart 1\n"


def test_signals_reach_the_processes_which_end_in_good_order(tmp_path: Path) -> None:
    kept = signal.getsignal(signal.SIGUSR1)
    outcome = run("await_signal", str(tmp_path), str(os.getpid()), logs=tmp_path)
    assert outcome.statuses == {0: 75, 1: 75} and outcome.status == 75
    assert outcome.stopped_by == signal.SIGUSR1 and signal.getsignal(signal.SIGUSR1) == kept


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalForwarder(tmp_path, None, 1.0) as forwarder:
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(SignalException):  # As nobody is there yet to hand it on to.
                os.kill(os.getpid(), signal.SIGUSR1)
            assert forwarder.received == signal.SIGUSR1
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_right_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the first one is handed on."""
    write = Path.write_text

    def interrupted(path: Path, text: str) -> int:
        monkeypatch.undo()
        written = write(path, text)
        os.kill(os.getpid(), signal.SIGUSR1)
        return written

    with subprocess.Popen(["sleep", "60"]) as process, SignalForwarder(tmp_path, None, 60.0) as forwarder:
        (tmp_path / f"pid-0-{process.pid}").touch()
        monkeypatch.setattr(Path, "write_text", interrupted)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert process.wait(30) == -signal.SIGUSR1 and forwarder.received == signal.SIGUSR1


def test_a_hang_ends_with_the_time_limit_and_says_where_it_was(tmp_path: Path) -> None:
    outcome = run("await_signal", str(tmp_path), logs=tmp_path, limit=2)
    assert outcome.stopped_by == signal.SIGALRM and outcome.status == 128 + signal.SIGALRM
    assert "in await_signal" in (tmp_path / "rank-1.log").read_text()


LAUNCHER = """\
import sys
from pathlib import Path
from lopt_pp.distributed.fork_server import start_server
from lopt_pp.distributed.launch import Launchers, launch
if __name__ == "__main__":
    start_server(1, preload=[])
    outcome = launch("launched:" + sys.argv[1], sys.argv[2:], Launchers(1), logs=Path(sys.argv[2]), preload=[])
    print(outcome.status, outcome.silent_death())
"""


@pytest.mark.slow
def test_processes_whose_fork_server_is_killed_stop_in_good_order(tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / "launcher.py"), "kill_server", str(tmp_path)]
    said = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert said.stdout.startswith("75 the process that those of the run are forked from was ended, most likely")
    assert said.stderr == "" and (tmp_path / "stopped").exists()


def test_the_first_to_fail_is_the_one_that_was_killed() -> None:
    """Whatever the agent has found: the others end as soon as they notice, often before it looks."""
    killed, aborted = {0: -signal.SIGKILL, 1: 1}, {0: -signal.SIGABRT, 1: 1}
    assert first_deaths({1: 1}, killed, seconds=0.1) == {0: -signal.SIGKILL}
    assert first_deaths({1: 1}, killed, seconds=40.0) == {1: 1}, "the agent may have killed it"
    assert first_deaths({1: 1}, aborted, seconds=0.1) == first_deaths({1: 1}, {}, seconds=0.1) == {1: 1}


@pytest.mark.slow
def test_a_launcher_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    """Neither one that works nor one that waits until the launcher has heard that it is done."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    command = [sys.executable, str(tmp_path / "launcher.py"), "ignore_signals", str(tmp_path)]
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as launcher:
        until((tmp_path / "ready").exists, 60)
        launcher.kill()
        process = psutil.Process(int((tmp_path / "ready").read_text()))
        (tmp_path / "go-on").touch()
        process.wait(30)
        _, said = launcher.communicate()
    assert said == "", "what Python's resource tracker warns of is not for the user"


def test_launchers_that_cannot_meet_say_so(tmp_path: Path) -> None:
    with pytest.raises(LoptError, match="cannot listen at 192.0.2.1:0"):
        launch("launched:succeed", [], Launchers(2, host="192.0.2.1"), logs=tmp_path)

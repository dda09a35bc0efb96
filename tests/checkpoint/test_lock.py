"""The lock of an output directory: one run at a time has it, and a dead one does not keep it."""

import dataclasses
import errno
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lopt_pp.checkpoint import lock
from lopt_pp.checkpoint.lock import Holder, LockLostError, hold, refuse_if_held, this_holder
from lopt_pp.errors import LoptError
from lopt_pp.util.process import Process, own_process

FAR = Process("far", "another-machine", 1, "1", 1)
"""Of which nothing can be known from here."""


def holder(process: Process | None = None, **changes: object) -> Holder:
    return dataclasses.replace(this_holder("launch", 0), process=process or own_process(), **changes)  # type: ignore


def locks(directory: Path) -> set[str]:
    return {name for name in os.listdir(directory) if name.startswith(".lock")}


def leave(directory: Path, own: Holder) -> Path:
    """The lock of a run that has ended without a word."""
    assert lock._create(directory / ".lock-4", own)
    return directory / ".lock-4"


def never(seconds: float) -> None:
    raise AssertionError("it waited")


class Pauses:
    """Counts the seconds that are waited, and does something after some of them."""

    def __init__(self, after: int = -1, action: Callable[[], object] = lambda: None) -> None:
        self.number, self._after, self._action = 0, after, action

    def __call__(self, seconds: float) -> None:
        assert seconds == 1.0
        self.number += 1
        if self.number == self._after:
            self._action()


def ended_process() -> Process:
    """One of this machine that is no longer there."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    there = dataclasses.replace(own_process(), pid=child.pid, parent=os.getpid())
    child.communicate(b"\n")
    return there


def test_a_living_run_has_it_and_is_named(tmp_path: Path) -> None:
    with hold(tmp_path, holder()) as own:
        assert locks(tmp_path) == {".lock-1"}
        with pytest.raises(LoptError, match=f"is in use by another run .process {os.getpid()} on .*: wait for its end"):
            refuse_if_held(tmp_path, holder(), Pauses())
        with pytest.raises(LoptError, match="is in use by another run"), hold(tmp_path, holder(), Pauses()):
            pass
        own.check()
    assert not locks(tmp_path)
    with hold(tmp_path, holder(), never):
        pass


def test_it_is_let_go_after_an_error_and_more_than_once(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hold(tmp_path, holder()) as own:
        raise ZeroDivisionError
    own.release()
    assert not locks(tmp_path)


@pytest.mark.parametrize("kind", ["ended", "another with its number"])
def test_a_process_that_is_gone_from_this_machine_loses_it_at_once(tmp_path: Path, kind: str) -> None:
    process = ended_process() if kind == "ended" else dataclasses.replace(own_process(), started="1")
    leave(tmp_path, holder(process))
    with hold(tmp_path, holder(), never) as own:
        assert locks(tmp_path) == {".lock-5"}
        own.check()


def test_a_process_whose_launcher_is_gone_has_a_moment_to_end(tmp_path: Path) -> None:
    path = leave(tmp_path, holder(dataclasses.replace(own_process(), parent=-1)))
    with pytest.raises(LoptError, match="in use"):
        refuse_if_held(tmp_path, holder(), pauses := Pauses())
    assert pauses.number == lock._ENDING_SECONDS
    refuse_if_held(tmp_path, holder(), Pauses(3, path.unlink))


@pytest.mark.parametrize("whole", [True, False])
def test_elsewhere_it_is_held_while_its_file_changes(tmp_path: Path, whole: bool) -> None:
    path = leave(tmp_path, holder(FAR))
    if not whole:  # Just being made, or on a disk that is full.
        path.write_text("{")
    pauses = Pauses(7, lambda: os.utime(path, ns=(1, 1)))
    with pytest.raises(LoptError, match="is in use by another run"):
        refuse_if_held(tmp_path, holder(), pauses)
    assert pauses.number == 7
    with hold(tmp_path, holder(), silent := Pauses()) as own:
        assert silent.number == lock.LEASE_SECONDS
        own.check()


def test_a_run_that_is_started_again_takes_it_at_once(tmp_path: Path) -> None:
    """By torchrun, or by Slurm, whatever machine it was on; another run of the same job does not."""
    path = leave(tmp_path, holder(FAR, launch="one", job="cluster/7", job_restart=1))
    refuse_if_held(tmp_path, holder(launch="one", restart=1), never)
    refuse_if_held(tmp_path, holder(job="cluster/7", job_restart=2), never)
    others = [holder(launch="one"), holder(job="cluster/7", job_restart=1), holder(job="cluster/8", job_restart=2)]
    for moment, other in enumerate(others):
        pauses = Pauses(1, functools.partial(os.utime, path, ns=(moment, moment)))
        with pytest.raises(LoptError, match="in use"):
            refuse_if_held(tmp_path, other, pauses)


def test_the_job_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (this_holder("a", 2).job, this_holder("a", 2).restart) == ("", 2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert (this_holder("a", 0).job, this_holder("a", 0).job_restart) == ("/7", 3)


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    """Whether nobody had it before, or a dead run."""
    for attempt in range(20):
        if attempt % 2:
            leave(tmp_path, holder(FAR, job="job"))
        begun, done, got = threading.Barrier(4), threading.Barrier(4), list[str]()

        def compete(begun: threading.Barrier = begun, done: threading.Barrier = done, got: list[str] = got) -> None:
            begun.wait()
            try:
                with hold(tmp_path, holder(job="job", job_restart=1), Pauses()) as own:
                    got.append("it")
                    done.wait()
                    own.check()
            except LoptError:
                done.wait()

        threads = [threading.Thread(target=compete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == ["it"] and not locks(tmp_path)


def test_a_run_that_has_lost_it_notices_before_it_publishes(tmp_path: Path) -> None:
    with hold(tmp_path, holder()) as own:
        lock._create(tmp_path / ".lock-2", holder(FAR))
        with pytest.raises(LockLostError, match="was taken by another run while this one did not answer"):
            own.check()
        assert own.is_lost
    assert locks(tmp_path) == {".lock-2"}, "the other run's lock was removed"


def test_a_beat_changes_the_time_and_notices_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.001)
    with hold(tmp_path, holder()) as own:
        os.utime(tmp_path / ".lock-1", ns=(1, 1))
        while lock._changed(tmp_path / ".lock-1") == 1:
            pass
        lock._create(tmp_path / ".lock-2", holder(FAR))
        while not own.is_lost:
            pass


def test_a_directory_that_is_emptied_under_way_is_still_its_own(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    with hold(directory, holder()) as own:
        (directory / ".lock-1").unlink()
        directory.rmdir()
        own.check()
        assert locks(directory) == {".lock-1"}
    assert not locks(directory)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    said = "--output_dir .*missing cannot be written: No such file"
    with pytest.raises(LoptError, match=said), hold(tmp_path / "missing", holder()):
        pass


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the lock of another user; here something else that is not a file, since root may read all."""
    (tmp_path / ".lock-3").mkdir()
    said = "may be in use by another run: .*lock-3 cannot be read: Is a directory"
    with pytest.raises(LoptError, match=said):
        refuse_if_held(tmp_path, holder(), never)
    with pytest.raises(LoptError, match=said), hold(tmp_path, holder(), never):
        pass
    assert locks(tmp_path) == {".lock-3"}

    def listdir(directory: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))

    monkeypatch.setattr(lock.os, "listdir", listdir)
    with pytest.raises(LoptError, match=f"{tmp_path.name} cannot be read: Permission denied"):
        refuse_if_held(tmp_path, holder(), never)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\0", b"[1]", b'{"process": 5}', b"[" * 100_000, *(b"restart", b"job_restart", b"pid", b"parent")],
    ids=lambda content: content[:12].decode("latin-1").strip("\0"),
)
def test_a_file_of_anything_is_nobodys_after_a_while(tmp_path: Path, content: bytes) -> None:
    path = leave(tmp_path, holder())
    if content.replace(b"_", b"").isalpha():  # What has a word where a number should be.
        said = json.loads(path.read_text())
        (said["process"] if content.decode() in said["process"] else said)[content.decode()] = "many"
        content = json.dumps(said).encode()
    path.write_bytes(content)
    pauses = Pauses()
    assert refuse_if_held(tmp_path, holder(), pauses) == {4} and pauses.number == lock.LEASE_SECONDS

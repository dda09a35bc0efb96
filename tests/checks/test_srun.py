"""The tasks of `srun` go through a check side by side, and end with the same words."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt_pp.checks.session
from lopt_pp import cli
from lopt_pp.checks.result import CheckFailed
from lopt_pp.checks.session import Ran, Session
from lopt_pp.checks.suite import look_at_machine
from lopt_pp.config.topology import Topology
from lopt_pp.distributed.launch import Launchers, Outcome
from lopt_pp.distributed.slurm import SlurmTask
from lopt_pp.distributed.store import LOOPBACK, serve
from lopt_pp.errors import LoptError

TWO = Topology(2, 2)


def as_tasks(do: Callable[[Session], Any], kind: type[Session] = Session, in_blocks: bool = True) -> list[str]:
    """What two tasks of `srun` say of something that they do in a session: the text of an error, or what came of it."""
    server = serve(LOOPBACK, 0)
    port = server.port
    del server

    def task(rank: int) -> str:
        try:
            with kind(TWO, None, SlurmTask(rank, 2, rank, 2, LOOPBACK, port, in_blocks or rank == 0)) as session:
                return str(do(session))
        except (CheckFailed, LoptError) as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(task, range(2)))


def test_what_goes_wrong_in_one_task_all_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def launch(entry: str, arguments: Any, launchers: Launchers, **_: Any) -> Outcome:
        if launchers.rank == 1:
            raise LoptError("no memory")
        return Outcome({0: 0})

    def do(session: Session) -> list[Any]:
        empty: dict[str, int] = {}
        said = []
        for attempt in (lambda: session.run("it", []), lambda: session.leader_says(lambda: empty["key"])):
            with pytest.raises(CheckFailed) as failed:
                attempt()
            said.append(str(failed.value))
        return [*said, session.all_say(session.leads)]

    monkeypatch.setattr(lopt_pp.checks.session, "launch", launch)
    monkeypatch.chdir(tmp_path)
    said = str(["a run could not start: rank 1: no memory", "KeyError: 'key'", [True, False]])
    assert as_tasks(do) == [said] * 2
    assert not list(tmp_path.iterdir())


class Unshared(Session):
    """The second task does not see the folder that the first has made."""

    def all_say(self, value: Any) -> list[Any]:
        return super().all_say(value if self.folder == Path() else self.leads)


def test_tasks_that_cannot_work_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for said in as_tasks(str, Unshared):
        assert said.startswith(f"the nodes do not share {tmp_path}; run the check in a directory that they share")
    spread = "srun has spread the tasks in turn over the nodes; give --distribution=block"
    assert as_tasks(str, in_blocks=False) == [spread] * 2
    assert not list(tmp_path.iterdir())


def test_another_task_has_ended(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ended(self: Session, value: Any) -> list[Any]:
        raise torch.distributed.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(Session, "all_say", ended)
    assert cli.main(["check"]) == 2
    assert "error: another task has ended; its own lines say why" in capsys.readouterr().err


class OneNodeWithoutGpus(Session):
    """The processes of its runs find something; another task sees a GPU, and this one does not."""

    found: list[Any]

    def all_say(self, value: Any) -> list[Any]:
        return [value, True]

    def run(self, name: str, *_: Any, **options: Any) -> Ran:
        self.last = name
        return Ran(self.folder, [0, 0], [""], self.found, set(), set())


def test_all_tasks_look_for_gpus_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    session = OneNodeWithoutGpus(TWO)
    node = {"host": "n1", "cpu": "CPU", "cores": 2, "local_rank": 0}
    session.found = [
        node | {"gpus": [{"uuid": "a"}], "unusable": ""},
        node | {"gpus": [], "unusable": "PyTorch sees no GPU"},
    ]
    assert look_at_machine(session, "auto")["backend"] == "gloo" and session.last == "look-spawned"
    session.found[1] = None
    with pytest.raises(CheckFailed, match="a process has ended before it said what it computes on"):
        look_at_machine(session, "auto")

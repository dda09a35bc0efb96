"""What a task of `srun` finds out about its place."""

import socket
from datetime import timedelta

import pytest

from lopt_pp.distributed import slurm
from lopt_pp.distributed.slurm import SlurmTask, first_node, meet, rank_and_size, slurm_task, tasks_per_node
from lopt_pp.distributed.store import LOOPBACK, join, join_machines, serve
from lopt_pp.errors import LoptError

STEP = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "rack1-[03-04,9]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "MASTER_ADDR": "10.0.0.1",
}


def test_a_task_knows_its_rank_and_where_the_others_are() -> None:
    task = slurm_task(STEP)
    assert task is not None
    assert (task.rank, task.size, task.local_rank, task.local_size, task.host) == (3, 5, 1, 2, "10.0.0.1")
    assert task.environment() == {
        "RANK": "3",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": str(task.port),
    }
    other = slurm_task(STEP | {"SLURM_STEP_ID": "3"})
    assert other is not None and 1024 < task.port < 20000 and other.port != task.port


@pytest.mark.parametrize(
    "more",
    [
        {"RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"RANK": "3", "TORCHELASTIC_RUN_ID": "none"},
        {"RANK": "3", "WORLD_SIZE": "10"},
    ],
)
def test_torchrun_under_srun_and_a_shell_are_no_tasks(more: dict[str, str]) -> None:
    assert slurm_task(STEP | more) is None
    assert slurm_task({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) is None, "a job's script"


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(LoptError, match=name):
        slurm_task({key: value for key, value in STEP.items() if key != name})


def test_a_job_script_that_sets_what_torchrun_sets_changes_nothing() -> None:
    assert slurm_task(STEP | {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1"}) == slurm_task(STEP)


def test_ranks_of_a_node_that_are_not_consecutive_are_noticed() -> None:
    places = [("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1")]  # --distribution=cyclic
    names = ("SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID")
    step = STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    tasks = [slurm_task(step | dict(zip(names, place, strict=True))) for place in places]
    assert [task is not None and task.in_blocks for task in tasks] == [True, False, False, True]
    task = slurm_task(STEP)
    assert task is not None and task.in_blocks


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_another_program_has(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "MEETING_PATIENCE", timedelta(milliseconds=100))
    other = serve(LOOPBACK, 0)
    with pytest.raises(LoptError, match=f"cannot meet at {LOOPBACK}:{other.port}: .*; set MASTER_ADDR to the first"):
        meet(SlurmTask(rank, 2, rank, 2, LOOPBACK, other.port), timedelta(seconds=1))


def test_an_address_that_other_nodes_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(LoptError, match=r"meet at n1:1: n1 is 127\.0\.1\.1 on this machine, where no other"):
        meet(SlurmTask(0, 2, 0, 1, "n1", 1), timedelta(seconds=1))


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("4") == [4]
    with pytest.raises(ValueError, match="not a list of tasks"):
        tasks_per_node("two")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("rack1-[03-05,9],other", "rack1-03"),
        ("a,b[1-2]", "a"),
        ("r[1-2]n[07,9]", "r1n07"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "1"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "-1", "WORLD_SIZE": "2"},
    ],
)
def test_what_no_launcher_has_set_is_refused(given: dict[str, str]) -> None:
    with pytest.raises(LoptError, match=f"RANK={given['RANK']} and WORLD_SIZE=.*unset both"):
        rank_and_size(given)


def test_a_rank_of_a_launcher_and_none() -> None:
    assert rank_and_size({"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2)
    assert rank_and_size({}) == rank_and_size({"SLURM_STEP_NUM_TASKS": ""}) == (0, 1)


def test_processes_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LoptError, match="WORLD_SIZE=2 and no MASTER_ADDR; .* or unset"):
        join_machines(0, 2)
    with pytest.raises(LoptError, match="WORLD_SIZE=2 and no MASTER_PORT; .* or unset"):
        join(0, 2)
    monkeypatch.setenv("MASTER_PORT", "a-port")
    with pytest.raises(LoptError, match="MASTER_PORT=a-port is not a port"):
        join(0, 2)

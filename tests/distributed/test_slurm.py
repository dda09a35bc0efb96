"""What a task of `srun` finds out about its place."""

import pytest

from lopt_pp.distributed.slurm import first_node, slurm_task, tasks_per_node
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


@pytest.mark.parametrize("more", [{"RANK": "0"}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_torchrun_under_srun_and_a_shell_are_no_tasks(more: dict[str, str]) -> None:
    assert slurm_task(STEP | more) is None
    assert slurm_task({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) is None, "a job's script"


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"])
def test_what_is_missing_is_named(name: str) -> None:
    with pytest.raises(LoptError, match=name):
        slurm_task({key: value for key, value in STEP.items() if key != name})


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

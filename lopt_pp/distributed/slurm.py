"""One of the tasks that `srun` has started: which process of the run it is, and where the tasks meet."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from lopt_pp.errors import LoptError, first_line

if TYPE_CHECKING:
    from torch.distributed import Store

MEETING_PATIENCE = timedelta(minutes=2)
"""For the other tasks to come; `srun` starts all of them at once."""


@dataclass(frozen=True)
class SlurmTask:
    """A task of a job step, one for each process of a run.

    Attributes:
        rank: of the process.
        size: number of tasks.
        local_rank: of the process on its node.
        local_size: number of tasks on its node.
        host: address of the first node, where rank 0 is.
        port: of that node, where the tasks meet; another one for each job step.
        in_blocks: whether the rank is what it is where each node has consecutive ones; a run needs that of all tasks.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    in_blocks: bool = True

    def environment(self) -> dict[str, str]:
        """What torchrun would put into the environment of this process."""
        place = {"RANK": self.rank, "WORLD_SIZE": self.size}
        place |= {"LOCAL_RANK": self.local_rank, "LOCAL_WORLD_SIZE": self.local_size}
        return {name: str(value) for name, value in place.items()} | {
            "MASTER_ADDR": self.host,
            "MASTER_PORT": str(self.port),
        }


def has_other_tasks(environment: Mapping[str, str] | None = None) -> bool:
    """Whether `srun` has started several tasks, of which this process is one or a child of one."""
    environment = os.environ if environment is None else environment
    # Only `srun` sets it; the others are also there in a job's script.
    number = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return number.isdecimal() and int(number) > 1


def rank_and_size(environment: MutableMapping[str, str] | None = None) -> tuple[int, int]:
    """Rank and number of processes, as a launcher puts them into the environment; 0 and 1 without one.

    What `srun` says of its tasks is put there first.

    Raises:
        LoptError: `srun` does not say what is needed, or there is something else than a rank and a number.
    """
    environment = os.environ if environment is None else environment
    take_place(environment)
    given = [environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")]
    if all(text.isdecimal() for text in given) and int(given[0]) < int(given[1]):
        return int(given[0]), int(given[1])
    raise LoptError(
        f"the environment has RANK={given[0]} and WORLD_SIZE={given[1]}, which is no process of a launcher; unset both "
        f"and LOCAL_RANK where none has started this one"
    )


def take_place(environment: MutableMapping[str, str] | None = None) -> None:
    """Puts into the environment what torchrun would, where this process is one of several tasks of `srun`.

    The ranks of a node are consecutive, also where Slurm's own are not (`--distribution=cyclic`).

    Raises:
        LoptError: Slurm's variables do not say what is needed.
    """
    environment = os.environ if environment is None else environment
    task = slurm_task(environment)
    if task is None:
        return
    environment.update(task.environment())
    if not task.in_blocks:
        environment["RANK"] = str(_first_rank(environment) + task.local_rank)


def slurm_task(environment: Mapping[str, str] | None = None) -> SlurmTask | None:
    """The task that this process is, where `srun` has started several, and no other launcher has come between.

    Raises:
        LoptError: Slurm's variables do not say what is needed.
    """
    environment = os.environ if environment is None else environment
    if not has_other_tasks(environment):
        return None
    size = int(environment["SLURM_STEP_NUM_TASKS"])
    if _is_launched(environment, size):
        return None
    try:
        node, nodes = int(environment["SLURM_NODEID"]), environment["SLURM_STEP_NODELIST"]
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        number = int(environment["SLURM_JOB_ID"]) + 997 * int(environment["SLURM_STEP_ID"])
        rank, local_rank, local_size = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"]), tasks[node]
        in_blocks = rank == _first_rank(environment) + local_rank
    except (KeyError, ValueError, IndexError) as error:
        raise LoptError(
            f"srun has started {size} tasks, and its variables do not say which this is: {error}"
        ) from error
    host = environment.get("MASTER_ADDR") or address_of(first_node(nodes))
    port = int(environment.get("MASTER_PORT") or 10000 + number % 10000)
    return SlurmTask(rank, size, local_rank, local_size, host, port, in_blocks)


def _first_rank(environment: Mapping[str, str]) -> int:
    """Of this node, where each node has consecutive ranks."""
    return sum(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[: int(environment["SLURM_NODEID"])])


def _is_launched(environment: Mapping[str, str], size: int) -> bool:
    """Whether a launcher inside the task has started this process. A job's script may set the same variables for each
    task from those of Slurm."""
    task = {"RANK": environment.get("SLURM_PROCID"), "WORLD_SIZE": str(size)}
    others = "RANK" in environment and any(environment.get(name, value) != value for name, value in task.items())
    return others or "TORCHELASTIC_RUN_ID" in environment


def meet(task: SlurmTask, timeout: timedelta) -> "Store":
    """A store that all tasks have; the first holds it.

    Args:
        task: this one.
        timeout: of waits on the store, once all have met.

    Raises:
        LoptError: the first task does not answer at the address, or cannot listen there.
    """
    # Late, so that a task which only asks for its place does not wait for PyTorch.
    from torch.distributed import TCPStore

    from lopt_pp.distributed.rendezvous import check_reachable
    from lopt_pp.distributed.store import serve

    try:
        if task.local_size < task.size:
            check_reachable(task.host)
        if task.rank == 0:
            store = serve(task.host, task.port, timeout=MEETING_PATIENCE)
            store.set("first", "")
        else:
            store = TCPStore(task.host, task.port, is_master=False, timeout=MEETING_PATIENCE)
            # Another program's store may be there.
            store.wait(["first"])
    except (OSError, RuntimeError, ValueError) as error:
        raise LoptError(
            f"the tasks of srun cannot meet at {task.host}:{task.port}: {first_line(error)}; set MASTER_ADDR to the "
            f"first node's address and MASTER_PORT to a free port"
        ) from error
    store.set_timeout(timeout)
    return store


def tasks_per_node(text: str) -> list[int]:
    """The tasks on each node: `2(x3),1` is two on each of three nodes, and one on the last."""
    counts = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{text!r} is not a list of tasks per node")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes: `rack1-[03-05,9],other` begins with `rack1-03`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def address_of(node: str) -> str:
    """A node's address as the others reach it, which its name need not be."""
    if shutil.which("scontrol") is not None:
        said = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True).stdout
        if found := re.search(r"\bNodeAddr=(\S+)", said):
            return found[1]
    return node

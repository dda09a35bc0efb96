"""Starts the runs that checks are made of, on one machine or by all tasks of `srun` together.

Under `srun` each task starts its own process of a run, and all tasks go through the same checks side by side; what only
one of them can see, such as the files of a run, the first looks at, and tells the others.
"""

import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from torch.distributed import DistError

from lopt_pp.checks.result import CheckFailed, reason
from lopt_pp.config.topology import Topology
from lopt_pp.distributed.launch import Launchers, Meeting, Outcome, launch
from lopt_pp.distributed.slurm import MEETING_PATIENCE, SlurmTask, meet
from lopt_pp.errors import LoptError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)
"""For the other tasks; more than any run of a check takes."""

PARTING = timedelta(seconds=10)
"""For the other tasks to read what was said last; one of them may have ended before."""

ENTRY = "lopt_pp.checks.rank"
"""The module with what a process of a run does."""

RESULT = "result-{}.json"
"""What the process of a rank has found, in the run's folder."""


@dataclass(frozen=True)
class Ran:
    """A run that is over.

    Attributes:
        folder: of the run, with its logs.
        statuses: exit status of each process, by rank; None of one that did not end by itself.
        texts: what each process has printed.
        results: what each process has found, where it is one that looks for something.
        signs: names of the signals that the launchers got, such as SIGALRM for a run that took too long.
        deaths: which processes a signal has ended.
    """

    folder: Path
    statuses: list[int | None]
    texts: list[str]
    results: list[Any]
    signs: set[str]
    deaths: set[str]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def succeeded(self) -> "Ran":
        """The same.

        Raises:
            CheckFailed: it has not come to its end.
        """
        if "SIGALRM" in self.signs:
            raise CheckFailed(
                "a run did not end; where each process was is in the logs (--keep DIR keeps them). If the last lines "
                "are about NCCL, NCCL_DEBUG=INFO says more"
            )
        if any(status != 0 for status in self.statuses):
            why = " and ".join(self.deaths) or reason(self.texts)
            raise CheckFailed(f"a run has failed: {why} (--keep DIR keeps its logs)")
        return self


class Session:
    """What all checks share.

    Args:
        topology: the layout that is asked for.
        keep: a folder for the runs; None for a temporary one, which is gone when the context ends. Under `srun` it is
            made in the working directory, which mostly all nodes share.
        task: of Slurm, which this process is; None where it starts all processes.

    Attributes:
        folder: of the runs; all tasks have the same, once the context has begun.
        backend: of the runs.

    Raises:
        LoptError: the tasks cannot meet, or do not share the folder, or the ranks of a node are not consecutive.
    """

    def __init__(self, topology: Topology, keep: Path | None = None, task: SlurmTask | None = None) -> None:
        self.topology = topology
        self.folder = Path()
        self._keep = keep
        self._temporary: Path | None = None
        self.backend: Literal["nccl", "gloo"] = "gloo"
        self.shares_gpus = False
        """Whether several processes have one GPU."""
        self._task = task
        self._store = None if task is None else meet(task, PATIENCE)
        self._count = 0
        self._spawns = False

    def __enter__(self) -> Self:
        try:
            if not all(self.all_say(self._task is None or self._task.in_blocks)):
                raise LoptError("srun has spread the tasks in turn over the nodes; give --distribution=block")
            self.folder = Path(self.leader_says(lambda: str(self._make_folder())))
            if not all(self.all_say(self.folder.is_dir())):
                raise LoptError(
                    f"the nodes do not share {self.folder.parent}; run the check in a directory that they share, or "
                    f"give --keep DIR"
                )
        except BaseException:
            self._part()
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._part()

    def _part(self) -> None:
        """Ends this task's part. The first task has the store, and stays until the others have read what it said."""
        try:
            if self._store is not None and self._task is not None:
                with suppress(DistError):  # The first task may be gone, or another one that it waits for.
                    self._store.set(f"left/{self._task.rank}", "")
                    if self.leads:
                        self._store.wait([f"left/{rank}" for rank in range(self._task.size)], PARTING)
        finally:
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _make_folder(self) -> Path:
        if self._keep is None:
            base = None if self._task is None else Path.cwd()
            self._temporary = Path(tempfile.mkdtemp(prefix="lopt-pp-check-", dir=base))
            return self._temporary
        if self._keep.exists() and any(self._keep.iterdir()):
            raise CheckFailed(f"--keep {self._keep} is not empty; name a new folder")
        self._keep.mkdir(parents=True, exist_ok=True)
        return self._keep.absolute()

    @property
    def processes(self) -> int:
        return self.topology.world_size

    @property
    def leads(self) -> bool:
        """Whether this process looks at files and prints."""
        return self._task is None or self._task.rank == 0

    def all_say(self, value: T) -> list[T]:
        """What each task says, by rank: plain data. All must call this."""
        self._count += 1
        if self._store is None or self._task is None:
            return [value]
        self._store.set(f"{self._count}/{self._task.rank}", json.dumps(value))
        return [json.loads(self._store.get(f"{self._count}/{rank}")) for rank in range(self._task.size)]

    def leader_says(self, find: Callable[[], T]) -> T:
        """What the first task finds, in all of them: plain data. All must call this.

        Raises:
            CheckFailed: it has found something wrong.
        """
        first = self.all_say(_attempt(find) if self.leads else {})[0]
        if "wrong" in first:
            raise CheckFailed(first["wrong"])
        found: T = first["found"]
        return found

    def run(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        entry: str = "train",
        processes: int | None = None,
        max_restarts: int = 0,
        time_limit: float = 120,
        spawn: bool = False,
    ) -> Ran:
        """Runs a function of `lopt_pp.checks.rank` in the processes of a run. All tasks must call this.

        Args:
            name: of the run, and of its folder.
            arguments: of the function.
            entry: the function.
            processes: how many; None for all, or 1 for the first task's alone.
            max_restarts: how often all are started again after one has failed.
            time_limit: seconds, after which they are ended.
            spawn: whether each process imports everything for itself.

        Raises:
            CheckFailed: a task could not start its process, in all tasks.
            KeyboardInterrupt: this process was told to end.
        """
        folder = self.folder / name
        more = {"LOPT_PP_CHECK_FOLDER": str(folder), "LOPT_PP_CHECK_SHARES_GPUS": str(int(self.shares_gpus))}
        launchers, meeting = self._meeting(processes or self.processes, more)

        def start() -> dict[str, Any]:
            if launchers is None:
                return {"statuses": {}, "texts": {}, "results": {}, "signal": "", "death": ""}
            folder.mkdir(parents=True, exist_ok=True)
            outcome = launch(
                f"{ENTRY}:{entry}",
                arguments,
                launchers,
                rendezvous=meeting,
                max_restarts=max_restarts,
                logs=folder,
                time_limit=time_limit,
                shutdown_seconds=10,
                start_method="spawn" if spawn or self._spawns else "forkserver",
            )
            return _told(outcome, folder)

        answers = self.all_say(_attempt(start))
        # The store of the run is there until now, since others may have ended later than this process.
        meeting = None
        wrong = [f"rank {rank}: {answer['wrong']}" for rank, answer in enumerate(answers) if "wrong" in answer]
        if wrong:
            raise CheckFailed(f"a run could not start: {'; '.join(wrong)}")
        all_said = [answer["found"] for answer in answers]
        if any(each["signal"] not in ("", "SIGALRM") for each in all_said):
            raise KeyboardInterrupt
        return Ran(
            folder,
            _by_rank(each["statuses"] for each in all_said),
            _by_rank(each["texts"] for each in all_said),
            _by_rank(each["results"] for each in all_said),
            {each["signal"] for each in all_said} - {""},
            {each["death"] for each in all_said} - {""},
        )

    def spawn_from_here_on(self) -> None:
        """Has each process import everything for itself."""
        self._spawns = True

    def _meeting(self, processes: int, more: dict[str, str]) -> tuple[Launchers | None, Meeting | None]:
        """This task's launcher of a run, None where it has no part in it, and where it meets the others."""
        task = self._task
        if task is None:
            launchers = Launchers(processes, environment=more)
            return launchers, launchers.meeting()
        if processes == 1:
            own = Launchers(1, environment=more)
            return (own, own.meeting()) if task.rank == 0 else (None, None)
        place = {"LOCAL_RANK": str(task.local_rank), "LOCAL_WORLD_SIZE": str(task.local_size)}
        first = Launchers(1, task.size, 0, task.host).meeting(timeout=MEETING_PATIENCE)
        port = self.leader_says(first.open)
        launchers = Launchers(1, task.size, task.rank, task.host, port, more | place)
        return launchers, first if task.rank == 0 else launchers.meeting(timeout=MEETING_PATIENCE)


def _attempt(find: Callable[[], Any]) -> dict[str, Any]:
    """What a task says of what it tries: what it has `found`, or what is `wrong`."""
    try:
        return {"found": find()}
    except (CheckFailed, LoptError) as error:
        return {"wrong": str(error)}
    except Exception as error:  # The others wait for word, whatever it is.
        return {"wrong": f"{type(error).__name__}: {error}"}


def _told(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """What a task tells the others of its processes, by their ranks as text."""
    return {
        "statuses": {str(rank): status for rank, status in outcome.statuses.items()},
        "texts": {str(rank): _read(folder / f"rank-{rank}.log")[-20_000:] for rank in outcome.statuses},
        "results": {str(rank): json.loads(_read(folder / RESULT.format(rank)) or "null") for rank in outcome.statuses},
        "signal": "" if outcome.stopped_by is None else signal.Signals(outcome.stopped_by).name,
        "death": outcome.silent_death(),
    }


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _by_rank(parts: Any) -> list[Any]:
    joined = {int(rank): value for part in parts for rank, value in part.items()}
    return [joined[rank] for rank in sorted(joined)]

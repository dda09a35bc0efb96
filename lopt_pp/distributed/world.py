"""The processes of a run: how they find each other, and how one learns that another has failed.

A key-value store (torchrun's) joins all processes: through it they agree before the first step, report afterwards, and
tell each other why the run cannot go on. It is not on the training path.
"""

import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.distributed.devices import agree_on_devices, choose_device
from lopt_pp.distributed.groups import join_groups
from lopt_pp.distributed.meeting import meet
from lopt_pp.distributed.slurm import rank_and_size
from lopt_pp.distributed.store import has_agent_store
from lopt_pp.errors import LoptError

logger = logging.getLogger(__name__)

_PATIENCE = 3.0
"""Seconds that a process which is about to end gives the store to answer, and the others to hear why."""


@dataclass(frozen=True)
class Failure:
    """Why a run cannot go on.

    Attributes:
        rank: of the process that said so first.
        message: for the user.
        keep: whether the weights that all stages have are good and worth writing out.
    """

    rank: int
    message: str
    keep: bool


@dataclass(frozen=True)
class World:
    """One process among those of the run.

    Attributes:
        rank: of this process.
        size: number of processes.
        device: this process computes on it.
        payload_backend: `nccl` or `gloo`.
        store: shared by all processes; an in-process one where there is only this process.
        last_words: another connection to the store, for the end of the process, whatever the first one is busy with.
        store_rank: of the process that holds the store; None where that is the launcher.
        restart: how often torchrun (`--max-restarts`) has started the run again.
        launch: names what one launcher has started, the first time and again: 32 hexadecimal digits that no other has.
    """

    rank: int
    size: int
    device: torch.device
    payload_backend: str
    store: dist.Store
    last_words: dist.Store
    store_rank: int | None = None
    restart: int = 0
    launch: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def is_restart(self) -> bool:
        """Whether the run was started again after one of its processes had failed."""
        return self.restart > 0

    def say(self, message: str, *values: object) -> None:
        """Logs what all processes do now: once, by rank 0."""
        if self.rank == 0:
            logger.info(message, *values)

    def fail(self, message: str, keep: bool = False) -> "Failure":
        """Tells all processes why the run cannot go on.

        Args:
            message: for the user.
            keep: whether the weights of all stages are good and worth writing out.

        Returns:
            The failure that was told first, by this process or another; this one's where the store does not answer.
        """
        own = Failure(self.rank, message, keep)
        told: list[Failure] = []

        def tell(store: dist.Store) -> None:
            first = store.compare_set("failure", "", json.dumps(asdict(own))).decode()
            for rank in range(self.size):
                store.set(f"failure/{rank}", first)
            told.append(Failure(**json.loads(first)))

        self._ask(tell)
        return told[0] if told else own

    def leave(self) -> None:
        """Says, as the last thing, that this process is done; the one that holds the store waits for all others."""
        others = [f"left/{rank}" for rank in range(self.size) if rank != self.rank]
        if self.rank == self.store_rank:
            self._ask(lambda store: store.wait(others, timedelta(seconds=_PATIENCE)))
        elif self.store_rank is not None:
            self._ask(lambda store: store.set(f"left/{self.rank}", ""))

    def _ask(self, question: Callable[[dist.Store], None]) -> None:
        """Asks the store, for a few seconds at most: it may be gone, or hang with the process that holds it."""

        def ask() -> None:
            with suppress(RuntimeError):
                question(self.last_words)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_PATIENCE)

    def await_failure(self, store: dist.Store) -> "Failure | None":
        """Waits until some process has failed (its failure is returned), or this one has called `end_waiting`.

        Args:
            store: a `connection` of the thread that waits.
        """
        told = store.get(f"failure/{self.rank}")
        return Failure(**json.loads(told)) if told else None

    def end_waiting(self) -> None:
        """Lets the thread of this process that is in `await_failure` go."""
        self.store.set(f"failure/{self.rank}", "")

    def connection(self, timeout: timedelta = timedelta(days=3650)) -> dist.Store:
        """Another connection to the store, for a thread that waits on it.

        Args:
            timeout: of its waits; by default they last as long as the run.
        """
        store = self.store.clone()  # type: ignore[attr-defined]  # The stubs lack it.
        store.set_timeout(timeout)
        return store

    def check_consistent(self, shared: Mapping[str, Any], in_words: Callable[[str], str] = str) -> None:
        """Compares what all processes must have in common.

        Args:
            shared: values by name; plain data.
            in_words: what a message calls one, by its name.

        Raises:
            LoptError: some process has something else than rank 0 has; the text names both and the value.
        """
        self.store.set(f"agree/{self.rank}", json.dumps(shared))
        reference = json.loads(self.store.get("agree/0"))
        for name, value in json.loads(json.dumps(shared)).items():
            if value != reference.get(name):
                raise LoptError(
                    f"rank 0 and rank {self.rank} disagree on {in_words(name)}: {reference.get(name)!r} against "
                    f"{value!r}; all processes must be given the same"
                )

    @contextmanager
    def one_process_first(self, what: str) -> Iterator[None]:
        """Lets the first process of each node do something alone; the others then find on disk what it has made.

        Args:
            what: it does, another name each time.
        """
        local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.size > 1 else 0
        done = f"{what}/{self.rank - local_rank}"
        if local_rank > 0:
            self.connection().get(done)
        try:
            yield
        finally:
            if local_rank == 0:
                self.store.set(done, "")

    def barrier(self, what: str) -> None:
        """Waits until all processes have come this far. Before training only: on its path nobody waits for all.

        Args:
            what: they have done, another name each time.
        """
        self.first_error(what, "")

    def from_rank_0(self, key: str, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, in all processes: for what they could find to be different. All must call this.

        Args:
            key: another one each time.
            make: is called on rank 0 only; gives plain data, which comes back as JSON has it.
        """
        if self.rank == 0:
            self.store.set(key, json.dumps(make()))
        return json.loads(self.store.get(key))

    def first_error(self, key: str, problem: str) -> str:
        """What the first process, by rank, has to say against something; empty where none has. All must call this.

        Args:
            key: of the question, another one each time.
            problem: this process's; empty if it has none.
        """
        # A path in it may not be valid Unicode.
        self.store.set(f"{key}/{self.rank}", problem.encode("utf-8", "backslashreplace").decode())
        if self.rank == 0:
            problems = (self.store.get(f"{key}/{rank}").decode() for rank in range(self.size))
            self.store.set(key, next(filter(None, list(problems)), ""))
        return self.store.get(key).decode()


@contextmanager
def connect(config: PipelineConfig) -> Iterator[World]:
    """Joins the processes that torchrun started, for as long as the context lasts; they may join again afterwards.

    Where all of them are on one machine they talk over the loopback interface only, unless the user has named another.

    Raises:
        LoptError: what they compute on does not fit together; in all of them.
    """
    rank, size = rank_and_size()
    own = choose_device(config.backend, int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device(own.device)
    if size == 1:
        alone = dist.HashStore()
        logger.info("%s", agree_on_devices(alone, rank, size, own))
        yield World(rank, size, device, own.backend, alone, alone)
        return
    is_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == size
    if is_one_machine and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    meeting = meet(rank, size, is_one_machine)
    run = dist.PrefixStore("run", meeting.store)
    last_words = run.clone()  # type: ignore[attr-defined]  # The stubs lack it.
    store_rank = None if has_agent_store() else 0
    world = World(rank, size, device, own.backend, run, last_words, store_rank, meeting.restart, meeting.launch)
    try:
        # First, since groups whose processes have other backends would wait for each other.
        summary = agree_on_devices(run, rank, size, own)
        if rank == 0:
            logger.info("%s", summary)
        join_groups(own.backend, dist.PrefixStore("groups", meeting.store), rank, size)
        yield world
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        world.leave()


def check_shared(world: World, directory: Path, why: str) -> None:
    """Sees that all processes have the same directory. All must call this.

    Raises:
        LoptError: some process does not see what rank 0 puts there.
    """
    mark = directory / ".seen-by-all"
    # The mark is made when all have come this far, so that a process which fails before leaves none behind.
    world.barrier("here")
    if world.rank == 0:
        mark.touch()
        world.store.set("mark", "")
    world.store.get("mark")
    problem = "" if mark.exists() else f"rank {world.rank} does not share {directory} with rank 0; {why}"
    problem = world.first_error("shared", problem)
    if world.rank == 0:
        mark.unlink()
    if problem:
        raise LoptError(problem)

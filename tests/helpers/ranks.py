"""Starts the ranks of a run one by one, with no launcher that could end one when another ends.

They are forked from a process that has imported the trainer already, so that one costs no seconds.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import util
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

# As the launcher does: a library that asks CUDA's driver as it is imported would keep all that are forked from the GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
context = multiprocessing.get_context("forkserver")
# The command imports the trainer only once its flags are parsed.
context.set_forkserver_preload(["lopt_pp.train", "lopt_pp.training.trainer"])


class Rank:
    """One process of a run.

    Attributes:
        process: it.
        log: the file that its standard output and standard error go to.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        port: int,
        module: str,
        arguments: Sequence[object],
        log: Path,
        more: dict[str, str],
    ) -> None:
        self.log = log
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
        environment = {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | more
        self.process = context.Process(target=_run, args=(module, arguments, environment, log))
        self.process.start()

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def status(self, seconds: float) -> int:
        """Waits for its end, and returns its exit status (negative: the signal that ended it)."""
        wait([self.process.sentinel], seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.text}"
        return self.process.exitcode


@contextmanager
def ranks(
    folder: Path, *arguments: Sequence[object], module: str = "lopt_pp.train", hosts: bool = False
) -> Iterator[list[Rank]]:
    """Runs `module.main(arguments)` in one process per given list of arguments; kills what is left at the end.

    Args:
        folder: for what they print.
        arguments: of each rank.
        module: with a function `main` that returns the exit status.
        hosts: whether NCCL is to take each for a host of its own: it refuses two on one GPU of one host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = len(arguments)
    started = [
        Rank(rank, size, port, module, own, folder / f"rank-{rank}.log", {"NCCL_HOSTID": str(rank)} if hosts else {})
        for rank, own in enumerate(arguments)
    ]
    try:
        yield started
    finally:
        for rank in started:
            rank.process.kill()
            rank.process.join()


def to_the_end(
    folder: Path, processes: int, arguments: Sequence[object], module: str = "lopt_pp.train", seconds: float = 240
) -> list[Rank]:
    """Runs `module.main(arguments)` in as many processes; all of them must end well."""
    with ranks(folder, *[arguments] * processes, module=module) as started:
        assert [rank.status(seconds) for rank in started] == [0] * processes, "".join(rank.text for rank in started)
    return started


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition waited for did not come"
        time.sleep(0.01)


def fork_the_server() -> None:
    """Has the server that processes of this process come from be a fork of it, in place of `python -c`.

    So it need not import the trainer again.
    """
    spawn = util.spawnv_passfds

    def fork(path: Any, words: Any, fds: Any) -> int:
        if "forkserver import main" not in words[-1]:
            return spawn(path, words, fds)
        if (number := os.fork()) == 0:
            # With the other end of the pipe that tells of its launcher's end it would outlive it. The numbers stay in
            # use: objects that have come along close them in their time.
            nowhere = os.open(os.devnull, os.O_RDWR)
            for fd in map(int, os.listdir("/proc/self/fd")):
                if fd > 2 and fd not in fds:
                    os.dup2(nowhere, fd)
            exec(words[-1], {})
        return number

    setattr(util, "spawnv_passfds", fork)  # noqa: B010


def _run(module: str, arguments: Sequence[object], environment: dict[str, str], log: Path) -> None:
    with log.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(importlib.import_module(module).main(list(arguments)))

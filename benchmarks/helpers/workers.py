"""Worker processes of a benchmark: forked, so that PyTorch is imported once, and given job after job."""

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Literal, Self

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.distributed.world import connect

_PR_SET_PDEATHSIG = 1


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class WorkerError(RuntimeError):
    """A worker failed; the text is its traceback."""


class Workers:
    """The ranks of a world, as long as the context lasts.

    Args:
        number: of processes.
        address: where rank 0 listens, as host and port.
        interface: the network interface that the ranks talk over.
        work: does one job: called in every worker with its `World` and the arguments of `run`.
        prepare: called first in every worker with its rank and its end of the pipe; it may set the environment.
        backend: `gloo`, or `nccl` for workers on GPUs.
    """

    def __init__(
        self,
        number: int,
        address: tuple[str, int],
        interface: str,
        work: Callable[..., Any],
        prepare: Callable[[int, Connection], None] = lambda rank, pipe: None,
        backend: Literal["gloo", "nccl"] = "gloo",
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self._processes = []
        host, port = address
        variables = {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(number),
            "GLOO_SOCKET_IFNAME": interface,
            "NCCL_SOCKET_IFNAME": interface,
        }
        for rank in range(number):
            near, far = context.Pipe()
            self.pipes.append(near)
            process = context.Process(
                target=_serve, args=(rank, far, list(self.pipes), variables, work, prepare, backend), daemon=True
            )
            process.start()
            far.close()
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def run(self, *arguments: Any) -> list[Any]:
        """Gives all workers one job.

        Returns:
            What each of them returned, by rank.

        Raises:
            WorkerError: one of them failed.
        """
        for pipe in self.pipes:
            pipe.send(arguments)
        results: dict[int, Any] = {}
        while len(results) < len(self.pipes):
            open_pipes = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(open_pipes)
            for rank in (rank for rank, pipe in enumerate(self.pipes) if pipe in ready):
                try:
                    failed, results[rank] = self.pipes[rank].recv()
                except EOFError as error:
                    raise WorkerError(f"rank {rank} has died") from error
                if failed:
                    raise WorkerError(f"rank {rank} failed:\n{results[rank]}")
        return [results[rank] for rank in range(len(self.pipes))]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe, process in zip(self.pipes, self._processes, strict=True):
            pipe.close()
            if kind is not None:
                process.terminate()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(
    rank: int,
    pipe: Connection,
    inherited: list[Connection],
    variables: Mapping[str, str],
    work: Callable[..., Any],
    prepare: Callable[[int, Connection], None],
    backend: Literal["gloo", "nccl"],
) -> None:
    # A worker ends with its benchmark, however that ended: at once on Linux, elsewhere when it next looks at its pipe,
    # of which it must not hold the other end.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for other in inherited:
        other.close()
    try:
        os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        prepare(rank, pipe)
        with connect(PipelineConfig(backend=backend, stream_timeout=120)) as world:
            while True:
                pipe.send((False, work(world, *pipe.recv())))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    finally:
        # Without the interpreter's own end: receives that nothing will ever answer would wait for it.
        os._exit(0)

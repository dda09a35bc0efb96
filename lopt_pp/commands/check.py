"""`lopt-pp check`: tries on this machine, or in this Slurm allocation, whether a run will be right, and how fast.

    lopt-pp check                       the GPUs of this machine, or two processes on its CPUs
    srun --ntasks 8 lopt-pp check       a process for each task of a Slurm allocation

It trains a small model, made on the spot, in every layout that fits, lets runs fail and stop, and measures the links
between the processes: one line for each check, `ok` with its figures, or `FAIL` with what is wrong and what to do.
"""

import argparse
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lopt_pp.commands.common import CommandParser, be_quiet, home_path, say
from lopt_pp.errors import LoptError, as_usage_errors
from lopt_pp.util.files import write_text

if TYPE_CHECKING:
    from lopt_pp.checks.session import Session


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 where all is well, 1 where a check has failed."""
    parser = CommandParser("lopt-pp check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nproc", type=int, help="processes (default: one for each GPU, at least 2; under srun its tasks)"
    )
    parser.add_argument(
        "--num_stages", type=int, help="stages of the layout that is tried most (default: one a process)"
    )
    parser.add_argument("--data_parallel", type=int, default=1, help="its replicas (default: 1)")
    parser.add_argument(
        "--backend",
        choices=["auto", "nccl", "gloo"],
        default="auto",
        help="nccl between GPUs, gloo between CPUs (default: auto, which is nccl where each process has a usable GPU)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only checks with such a word in their name"
    )
    parser.add_argument("--json", type=home_path, metavar="FILE", help="write versions, devices and all figures there")
    parser.add_argument(
        "--keep",
        type=home_path,
        metavar="DIR",
        help="keep the runs there, with the logs of each process (default: a temporary directory, removed at the end)",
    )
    given = parser.read(arguments)
    for name in ("nproc", "num_stages", "data_parallel"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name}: at least 1")
    with as_usage_errors():
        return _check(given)


def _check(given: argparse.Namespace) -> int:
    say()
    # Late, so that --help does not wait for torch.
    import torch

    from lopt_pp.checks.result import CheckFailed, as_json, has_passed
    from lopt_pp.checks.session import Session
    from lopt_pp.checks.suite import look_at_machine, machine_lines, run_all
    from lopt_pp.config.pipeline import PipelineConfig
    from lopt_pp.distributed.slurm import slurm_task

    be_quiet()
    task = slurm_task()
    processes = given.nproc or (task.size if task is not None else max(2, torch.cuda.device_count()))
    if processes < 2:
        raise LoptError("--nproc 1: a check takes 2 processes at least; they can share a GPU")
    if task is not None and processes != task.size:
        raise LoptError(f"--nproc {processes}: srun has started {task.size} tasks, which are the processes")
    stages = given.num_stages or max(1, processes // given.data_parallel)
    topology = PipelineConfig(num_stages=stages, data_parallel=given.data_parallel).topology(processes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Session(topology, given.keep, task) as session:
            machine = look_at_machine(session, given.backend)
            _tell(session, *machine_lines(machine))
            results = run_all(session, given.only, lambda result: _tell(session, result.line()))
            if session.leads and given.json is not None:
                write_text(given.json, as_json(machine, results))
    except CheckFailed as error:
        raise LoptError(str(error)) from error
    except torch.distributed.DistError as error:
        raise LoptError("another task has ended; its own lines say why") from error
    return 0 if has_passed(results) else 1


def _tell(session: "Session", *lines: str) -> None:
    if session.leads:
        print(*lines, sep="\n", flush=True)

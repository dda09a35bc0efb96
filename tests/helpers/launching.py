"""Starts the processes of a run, as a user does."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent


def environment() -> dict[str, str]:
    """One thread in each process, and nothing of an outer launcher."""
    outer = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return outer | {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{HELPERS}:{TESTS.parent}",
    }


def torchrun(processes: int, *command: str) -> list[str]:
    """The command line that starts `command` in that many processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp"]
    return [*launcher, "--nproc-per-node", str(processes), *command]


def run(command: Sequence[str], timeout: float = 240, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, from this directory or another one, and keeps what it prints."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout, cwd=cwd)


def train(processes: int, *flags: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the trainer under torchrun, or by itself for one process."""
    if processes == 1:
        return run([sys.executable, "-m", "lopt_pp.train", *flags], timeout)
    return run(torchrun(processes, "-m", "lopt_pp.train", *flags), timeout)

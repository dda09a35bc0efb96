"""How many processes `lopt-pp train` starts on this machine, and why."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lopt_pp.config.train_config import Config

_DEVICES = ("nvidia[0-9]*", "nvidia-caps", "dxg", "kfd")
"""Files in /dev of NVIDIA's driver, of Windows' for its Linux, and of AMD's."""


@dataclass(frozen=True)
class ProcessCount:
    """How many processes, and why so many in words."""

    number: int
    why: str

    def __str__(self) -> str:
        return f"{_counted(self.number, 'process')} ({self.why})"


def count_processes(config: Config, nproc: int | None, count_gpus: Callable[[], int]) -> ProcessCount:
    """Decides how many processes a run has.

    `--nproc` says it, else the layout (`--pipeline_processes`, `--data_parallel`); else there is one for each stage
    where each can have a GPU of its own, or as many as there are GPUs. Without GPUs one process trains all stages in
    turn, with the same result.

    Args:
        config: of the run.
        nproc: the flag.
        count_gpus: is called where it matters.
    """
    pipeline = config.pipeline
    stages, processes, replicas = pipeline.num_stages, pipeline.pipeline_processes, pipeline.data_parallel
    if nproc is not None:
        return ProcessCount(nproc, f"--nproc {nproc}")
    if processes is not None:
        times = "" if replicas is None else f" x --data_parallel {replicas}"
        return ProcessCount(processes * (replicas or 1), f"--pipeline_processes {processes}{times}")
    gpus = 0 if pipeline.backend == "gloo" else count_gpus()
    fit = max(1, min(stages, gpus // (replicas or 1)))
    number = fit * (replicas or 1)
    what = _counted(stages, "stage") + ("" if replicas is None else f" x --data_parallel {replicas}")
    if gpus > 0:
        more = gpus // fit if replicas is None else 1
        left = f"; --nproc {more * fit} makes {more} replicas" if more > 1 else ""
        return ProcessCount(number, f"{what} on {min(number, gpus)} of {_counted(gpus, 'GPU')}{left}")
    left = f"; --nproc {stages} makes one for each" if stages > 1 and replicas is None else ""
    return ProcessCount(number, f"{what} on the CPU{left}")


def _counted(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{plural if number != 1 else ''}"


def may_have_gpus() -> bool:
    """Whether there is a driver of GPUs; that takes no time, and PyTorch knows the rest."""
    return any(any(Path("/dev").glob(pattern)) for pattern in _DEVICES)


def gpus_seen() -> int:
    """The GPUs of this machine that PyTorch sees, asked for without starting CUDA in this process."""
    if not may_have_gpus():
        return 0
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # Late: where there is no GPU nobody waits for it.
    import torch

    return torch.cuda.device_count()

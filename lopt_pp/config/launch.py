"""The flags of `lopt-pp train` that say which processes it starts. They change nothing in a run of these processes."""

from dataclasses import dataclass, field
from typing import ClassVar

from lopt_pp.config.fields import check_types
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class LaunchConfig:
    """The processes that `lopt-pp train` starts."""

    _argument_group_name: ClassVar[str] = "Processes"

    nproc: int | None = field(
        default=None,
        metadata={
            "help": "Number of processes that lopt-pp train starts on this machine. By default what "
            "--pipeline_processes and --data_parallel say; else one for each stage, or fewer where there are fewer "
            "GPUs; on CPUs one. Under torchrun, accelerate launch or srun with several tasks those are the processes."
        },
    )
    max_restarts: int = field(
        default=0,
        metadata={
            "help": "How often lopt-pp train starts its processes again after one has failed; the run goes on from its "
            "latest checkpoint. torchrun has a flag of the same name."
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.nproc is not None and self.nproc < 1:
            raise LoptError(f"--nproc {self.nproc}: at least 1")
        if self.max_restarts < 0:
            raise LoptError(f"--max_restarts {self.max_restarts}: at least 0")

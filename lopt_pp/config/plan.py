"""The flags of `lopt-pp plan` that are not a run's."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lopt_pp.config.fields import check_types
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class PlanConfig:
    """What a run computes on, and where."""

    _argument_group_name: ClassVar[str] = "Plan"

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a microbatch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Microbatches of an optimizer step."})
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens of a row. Memory goes by the longest rows, so all are taken to be full."},
    )
    nproc: int | None = field(
        default=None,
        metadata={
            "help": "Processes of the run, where --pipeline_processes and --data_parallel do not say it. By default "
            "one for each stage."
        },
    )
    gpu_memory: float | None = field(
        default=None, metadata={"help": "GiB of memory that each process has, to say whether the run fits."}
    )
    device: Literal["cuda", "cpu"] = field(
        default="cuda", metadata={"help": "What the run computes on. No GPU is needed to plan for one."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object in place of tables; sizes in bytes."})

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise LoptError(f"--{name} {getattr(self, name)}: at least {least}")
        if self.nproc is not None and self.nproc < 1:
            raise LoptError(f"--nproc {self.nproc}: at least 1")
        if self.gpu_memory is not None and self.gpu_memory <= 0:
            raise LoptError(f"--gpu_memory {self.gpu_memory:g}: a number of GiB above 0")

"""Which process of a pipeline holds which stages."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lopt_pp.errors import LoptError
from lopt_pp.flags import check_types


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is laid over processes, and the stream between them."""

    _argument_group_name: ClassVar[str] = "Pipeline"

    num_stages: int = field(
        default=2,
        metadata={
            "help": "Number of blocks that the model is cut into (at the midpoint for 2). Each learns from its own "
            "loss. Start as many processes, or fewer: then a process holds several stages and runs them in turn."
        },
    )
    queue_depth: int = field(
        default=2,
        metadata={
            "help": "Number of microbatches that may wait at each end of a boundary before the sending stage waits. "
            "It changes no result. A slow link wants more: twice its one-way delay over a microbatch's time, plus 2."
        },
    )
    backend: Literal["auto", "nccl", "gloo"] = field(
        default="auto",
        metadata={
            "help": "Transport of the hidden states: NCCL between GPUs, gloo between CPUs. 'auto' takes NCCL when "
            "every process of this machine has a GPU of its own."
        },
    )
    stream_timeout: float = field(
        default=1800.0,
        metadata={
            "help": "Seconds that a stage waits for its neighbour's next message before it gives the neighbour up as "
            "hanging. A neighbour that dies is noticed at once, whatever this is. More than the slowest step takes."
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_stages < 1:
            raise LoptError(f"--num_stages {self.num_stages}: at least 1")
        if self.queue_depth < 1:
            raise LoptError(f"--queue_depth {self.queue_depth}: at least 1")
        if self.stream_timeout <= 0:
            raise LoptError(f"--stream_timeout {self.stream_timeout}: a number of seconds above 0")


@dataclass(frozen=True)
class Topology:
    """The stages of a pipeline, laid over its processes in order.

    Args:
        num_stages: blocks of the model.
        num_processes: of the pipeline, 1 to `num_stages`.

    Raises:
        LoptError: the processes do not fit the stages.
    """

    num_stages: int
    num_processes: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_processes <= self.num_stages:
            raise LoptError(
                f"{self.num_processes} processes do not fit --num_stages {self.num_stages}: "
                f"start 1 to {self.num_stages} (torchrun --nproc-per-node) or change --num_stages"
            )

    def stages_of(self, rank: int) -> range:
        """The stages that process `rank` holds."""
        first, stop = (self.num_stages * r // self.num_processes for r in (rank, rank + 1))
        return range(first, stop)

    def rank_of(self, stage: int) -> int:
        """The process that holds `stage`."""
        return next(rank for rank in range(self.num_processes) if stage in self.stages_of(rank))

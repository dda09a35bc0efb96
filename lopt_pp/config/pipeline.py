"""How the model is laid over processes, and the stream between them."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lopt_pp.config.fields import Resume, check_types, flag
from lopt_pp.config.topology import Topology
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class PipelineConfig:
    """How the model is laid over processes, and the stream between them."""

    _argument_group_name: ClassVar[str] = "Pipeline"

    num_stages: int = field(
        default=2,
        metadata=flag(
            "Number of blocks that the model is cut into. Each learns from its own loss; with 1 the whole "
            "model learns from the task, which is ordinary training.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    split: str = field(
        default="midpoint",
        metadata=flag(
            "Where the cuts lie. midpoint: blocks of equal length, as in the paper. auto: blocks of equal "
            "cost, by a short timing of the model's parts at the start, the output head and the loss included. Or the "
            "first layer of each block after the first, such as 12,18 for three blocks.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    pipeline_processes: int | None = field(
        default=None,
        metadata=flag(
            "Number of processes that the stages are laid over, in order, one or more stages each; a process "
            "runs its stages in turn. The result is the same. By default one for each stage, or all there are if those "
            "are fewer.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    data_parallel: int | None = field(
        default=None,
        metadata=flag(
            "Number of replicas of the pipeline, each with rows of its own: a step has data_parallel times as "
            "many. By default what the number of processes leaves. Replicas of a stage have neighbouring ranks.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    sharding: Literal["none", "full"] = field(
        default="none",
        metadata=flag(
            "What the replicas of a stage share out among them. none: nothing, each has the whole stage (DDP). "
            "full: parameters, gradients and optimizer state (FSDP2).",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    queue_depth: int = field(
        default=2,
        metadata=flag(
            "Number of microbatches that may wait at each end of a boundary before the sending stage waits. "
            "It changes no result. A slow link wants more: twice its one-way delay over a microbatch's time, plus 2.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    backend: Literal["auto", "nccl", "gloo"] = field(
        default="auto",
        metadata=flag(
            "Transport of the hidden states: NCCL between GPUs, gloo between CPUs. 'auto' takes NCCL where "
            "there is a GPU that PyTorch can use, and each process then needs one of its own; else gloo.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    stream_timeout: float = field(
        default=1800.0,
        metadata=flag(
            "Seconds that a stage waits for its neighbour's next message before it gives the neighbour up as "
            "hanging. A neighbour that dies is noticed at once, whatever this is. More than the slowest step takes.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_stages < 1:
            raise LoptError(f"--num_stages {self.num_stages}: at least 1")
        for name in ("pipeline_processes", "data_parallel"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise LoptError(f"--{name} {number}: at least 1")
        if (cuts := self.boundaries) is not None:
            if [0, *cuts] != sorted({0, *cuts}):
                raise LoptError(f"--split {self.split}: layer numbers above 0 that ascend, such as 12,18")
            if len(cuts) != self.num_stages - 1:
                raise LoptError(f"--split {self.split} makes {len(cuts) + 1} stages; --num_stages is {self.num_stages}")
        if self.queue_depth < 1:
            raise LoptError(f"--queue_depth {self.queue_depth}: at least 1")
        if not 0 < self.stream_timeout <= 1e9:
            raise LoptError(f"--stream_timeout {self.stream_timeout}: a number of seconds above 0, at most 1e9")

    @property
    def boundaries(self) -> list[int] | None:
        """The cuts that `split` names; None where it names a way to find them."""
        if self.split in ("midpoint", "auto"):
            return None
        try:
            return [int(number) for number in self.split.split(",")]
        except ValueError:
            raise LoptError(f"--split {self.split}: midpoint, auto, or layer numbers such as 12,18") from None

    def topology(self, world_size: int, end_to_end: bool = False) -> "Topology":
        """Lays the stages over the processes that there are.

        Args:
            world_size: number of processes.
            end_to_end: whether the stages need no loss of their own, so that each process holds just one.

        Raises:
            LoptError: they do not fit.
        """
        stages, processes, replicas = self.num_stages, self.pipeline_processes, self.data_parallel
        if processes is None:
            processes = min(stages, world_size) if replicas is None else world_size // replicas
        if replicas is None:
            replicas = world_size // processes if processes else 0
        if processes * replicas != world_size or not 1 <= processes <= stages:
            given = [("pipeline_processes", self.pipeline_processes), ("data_parallel", self.data_parallel)]
            flags = "".join(f" --{name} {number}" for name, number in given if number is not None)
            raise LoptError(
                f"{world_size} process{'es do' if world_size > 1 else ' does'} not fit --num_stages {stages}{flags}: "
                f"they are to be replicas times 1 to {stages} pipeline processes; start another number (--nproc; "
                f"torchrun --nproc-per-node), or change --num_stages, --pipeline_processes or --data_parallel"
            )
        return Topology(processes if end_to_end else stages, processes, replicas)

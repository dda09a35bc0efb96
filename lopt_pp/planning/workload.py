"""What is asked of a plan and what it answers, process by process."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.config.optim import OptimConfig


@dataclass(frozen=True)
class Workload:
    """What a process computes on, and how: the flags that change what it needs.

    Attributes:
        rows: of a microbatch.
        tokens: of a row; all of them are real, and each but the first is a target.
        accumulation: microbatches of an optimizer step.
        stage: dtype and checkpointing.
        objective: what the stages learn from.
        optim: the optimizer.
        queue_depth: of the boundaries between processes.
        replicas: of each stage.
        sharding: what the replicas share out among them.
        device: of all this.
    """

    rows: int
    tokens: int
    accumulation: int
    stage: StageConfig = StageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    queue_depth: int = 2
    replicas: int = 1
    sharding: Literal["none", "full"] = "none"
    device: torch.device = torch.device("cuda")

    def __post_init__(self) -> None:
        if self.stage.neftune_noise_alpha is not None:  # It draws values, of which a plan has none.
            object.__setattr__(self, "stage", replace(self.stage, neftune_noise_alpha=None))
        if self.device.type == "cpu" and self.stage.activation_offloading:  # There they stay where they are.
            object.__setattr__(self, "stage", replace(self.stage, activation_offloading=False))

    @property
    def shards(self) -> int:
        """Processes that hold a shard each of one stage."""
        return self.replicas if self.sharding == "full" else 1

    @property
    def memory_multiple(self) -> int:
        """Of bytes that the device gives memory out in."""
        return 512 if self.device.type == "cuda" else 1

    def finds_gradients(self, learned: int) -> bool:
        """Whether a microbatch finds gradients to add to, where a step has so many that are learned from.

        All but the first of a step do, and are alike. DDP has room for gradients from the start.
        """
        return learned > 1 or self.replicas > 1


@dataclass(frozen=True)
class Memory:
    """Bytes that a process holds at its fullest moment, by what they are for.

    Attributes:
        weights: and buffers.
        gradients: that are there at that moment. With one microbatch per step they come as its activations go.
        optimizer: AdamW's state.
        activations: of the microbatches at work, with all that comes and goes besides.
        gathered: of replicas that share a stage out: layers that are whole for the moment, with their gradients.
        queue: messages that wait at the process's boundaries, or buffers for them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    queue: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.queue


@dataclass(frozen=True)
class Requirements:
    """What one process needs.

    Attributes:
        parameters: that it holds, those of local heads included; with sharding, of the whole stages.
        memory: in bytes.
        kept: bytes of activations that are alive when a microbatch's forward is through, the most of its stages.
        operations: floating-point operations for a microbatch, forward and backward.
    """

    parameters: int
    memory: Memory
    kept: int
    operations: int

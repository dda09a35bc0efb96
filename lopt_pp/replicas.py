"""Keeps the replicas of one stage alike: DDP or FSDP2 among the processes that hold it, and nobody else.

Each replica trains on microbatches of its own. Its loss is its share of the step's mean over all replicas, so their
gradients are to be summed; both wrappers take the mean, which the stage makes up for by a factor.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lopt_pp.split import BlockModel, BlockOutput


@dataclass(frozen=True)
class Replicas:
    """The processes that hold the same stages.

    Attributes:
        mesh: one-dimensional, of these processes.
        sharded: whether they share the parameters, gradients and optimizer state out among them (FSDP2), or each has
            all of them (DDP).
    """

    mesh: DeviceMesh
    sharded: bool

    @property
    def size(self) -> int:
        return self.mesh.size()

    def shard(self, block: BlockModel, objective: nn.Module) -> None:
        """Leaves each process its share of the parameters: layer by layer, the rest of the block, the local head."""
        for layer in block.layers:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(block, mesh=self.mesh)
        if any(True for _ in objective.parameters()):
            fully_shard(objective, mesh=self.mesh)

    def replicate(self, module: nn.Module) -> DistributedDataParallel:
        """Wraps a module so that the gradients of its parameters become the mean over the replicas."""
        device = next(module.parameters()).device
        return DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self.mesh.get_group(),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


class Learner(nn.Module):
    """The parameters that a stage trains, as one module; its forward is the block's."""

    def __init__(self, block: BlockModel, objective: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.objective = objective

    def forward(self, **inputs: Any) -> BlockOutput:
        return self.block(**inputs)

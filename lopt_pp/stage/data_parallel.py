"""Keeps the replicas of one stage alike: DDP or FSDP2 among the processes that hold it, and nobody else.

Each replica trains on microbatches of its own. Its loss is its share of the step's mean over all replicas, so their
gradients are to be summed; both wrappers take the mean, which the stage makes up for by a factor.

A block and its objective are wrapped apart, since one may learn while the other is frozen: each wrapper waits for the
gradients of its own parameters, once there are any.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lopt_pp.model.block import BlockModel


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

    def join(self, module: nn.Module) -> nn.Module:
        """Has the replicas train a module together.

        Returns:
            What is to be called in its place: itself where it is sharded, else a wrapper that averages the gradients.
        """
        if self.sharded:
            self.shard(module)
            return module
        learns = any(parameter.requires_grad for parameter in module.parameters())
        return self.replicate(module) if learns else module

    def shard(self, module: nn.Module) -> None:
        """Leaves each process its share of the parameters of a block or an objective: layer by layer, then the rest."""
        for part in list(module.modules()):
            for layer in part.layers if isinstance(part, BlockModel) else ():
                fully_shard(layer, mesh=self.mesh)
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=self.mesh)

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


def reshard(modules: Iterable[nn.Module]) -> None:
    """Leaves replicas their shards again: what is sharded and only runs forward stays whole until it is told not to."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()

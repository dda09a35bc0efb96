"""Keeps the replicas of one stage alike: DDP or FSDP2 among the processes that hold it, and nobody else.

Each replica trains on microbatches of its own. Its loss is its share of the step's mean over all replicas, so their
gradients are to be summed; both wrappers take the mean, which the stage makes up for by a factor.

A block and its objective are wrapped apart, since one may learn while the other is frozen: each wrapper waits for the
gradients of its own parameters, once there are any.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.nn.parallel import DistributedDataParallel

from lopt_pp.errors import LoptError
from lopt_pp.model.block import BlockModel
from lopt_pp.model.shares import ShareOf


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
        """Leaves each process its share of the parameters of a block or an objective: layer by layer, then the rest.

        Of those that were loaded by `keep` it has its share already; the others are whole on the device for a moment.
        """
        _check_one_dtype(module)
        kept = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner.named_parameters(recurse=False)
            if isinstance(parameter, ShareOf)
        ]
        for part in list(module.modules()):
            for layer in part.layers if isinstance(part, BlockModel) else ():
                fully_shard(layer, mesh=self.mesh)
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=self.mesh)
        # A module that is sharded may be given its parameters, as by load_state_dict(assign=True): FSDP2 takes them up
        # when it first runs. One that two modules share (tied embeddings) stays one.
        made: dict[ShareOf, nn.Parameter] = {}
        for owner, name, parameter in kept:
            if parameter not in made:
                whole = joined(parameter.share, parameter, self.mesh, [Shard(0)])
                made[parameter] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
            setattr(owner, name, made[parameter])

    def keep(self, parameter: nn.Parameter) -> nn.Parameter:
        """What a block is to have of a parameter that has just been loaded where replicas hold a shard each.

        Args:
            parameter: whole, on the device that trains it.
        """
        share = _part(parameter.detach(), Shard(0), self.mesh).clone()
        return ShareOf.make(parameter, share)

    def replicate(self, module: nn.Module) -> "Replicated":
        """Wraps a module so that the gradients of its parameters become the mean over the replicas."""
        device = next(module.parameters()).device
        return Replicated(
            module,
            # What came from the model's files is the same in all replicas: sent once more, it would be there twice.
            init_sync=not isinstance(module, BlockModel),
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self.mesh.get_group(),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


class Replicated(DistributedDataParallel):
    """A module whose gradients become the mean over its replicas, and are held once.

    DDP sends gradients from buckets that it keeps. What microbatches before the last of a step find (`no_sync`) would
    add up in memory of its own beside these, 4 bytes more for each parameter. So gradients are views of the buckets
    from the beginning, and are set to zero after a step instead of being dropped.

    Args:
        module: whose parameters are trained.
        options: of DDP; `gradient_as_bucket_view` is to be among them.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        _zero_gradients(module)  # DDP copies them into its buckets, and puts views of these in their place.
        super().__init__(module, **options)
        self._has_learned = False

    @contextmanager
    def stepping(self, learned: bool = True) -> Iterator[None]:
        """To be around a step of the optimizer, which drops gradients.

        Args:
            learned: whether the module has learned in this step. If not, the optimizer sees no gradient of it, as it
                would see none without replicas: with one of zero it would still decay weights.
        """
        kept = [(parameter, parameter.grad) for parameter in self.module.parameters() if parameter.requires_grad]
        for parameter, _ in kept if not learned else ():
            parameter.grad = None
        yield
        if learned and not self._has_learned:
            # Once, at its next forward, DDP makes new buckets, in the order in which gradients came.
            self._has_learned = True
            del kept
            _zero_gradients(self.module)
            return
        for parameter, gradient in kept:
            parameter.grad = gradient if gradient is None else gradient.zero_()


def _zero_gradients(module: nn.Module) -> None:
    """Gives parameters gradients of zero that take no memory: one number each."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            parameter.grad = zero.expand_as(parameter)


def share_of(tensor: torch.Tensor, target: DTensor) -> torch.Tensor:
    """Of a whole tensor, the part that this process holds of `target`; a view.

    Args:
        tensor: of the target's shape, on any device.
        target: a parameter of which each replica has a shard (FSDP2).
    """
    (placement,) = target.placements
    return _part(tensor, placement, target.device_mesh) if isinstance(placement, Shard) else tensor


def joined(share: torch.Tensor, like: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """Of the shares that the processes hold, one tensor with the shape of `like`; nothing is sent."""
    return DTensor.from_local(share, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _part(tensor: torch.Tensor, placement: Shard, mesh: DeviceMesh) -> torch.Tensor:
    # As FSDP2 cuts it: the last processes have less, or nothing.
    rank, parts = mesh.get_local_rank(), tensor.chunk(mesh.size(), placement.dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(placement.dim, 0, 0)


def _check_one_dtype(module: nn.Module) -> None:
    """Sees that FSDP2 can gather the parameters that are trained: it wants one dtype for all that it gathers at once.

    Raises:
        LoptError: `transformers` keeps some of them in float32 in a model of 16 bits.
    """
    trained = {name: parameter.dtype for name, parameter in module.named_parameters() if parameter.requires_grad}
    if len(set(trained.values())) > 1:
        odd = next(name for name, dtype in trained.items() if dtype == torch.float32)
        raise LoptError(
            f"--dtype pure_bfloat16 with --sharding full: transformers keeps {odd} in float32, and FSDP2 takes one "
            f"dtype; give --dtype bfloat16, or --sharding none"
        )


def reshard(modules: Iterable[nn.Module]) -> None:
    """Leaves replicas their shards again: what is sharded and only runs forward stays whole until it is told not to."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()

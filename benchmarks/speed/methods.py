"""Ways to train one model on two processes: this project's, and what a user would take instead.

All of them have the same model, microbatches, loss and AdamW, and run the same steps when they are told to.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.helpers.own_shapes import OwnShapesPipeline
from benchmarks.helpers.synthetic import OPTIM
from benchmarks.speed.local_learning import LocalLearning
from benchmarks.speed.shared_model import PROCESSES, Cut, Method, SharedModel, Trial
from lopt_pp.data import Microbatch
from lopt_pp.model.block import BlockModel
from lopt_pp.objectives import ObjectiveConfig, task_objective
from lopt_pp.stage.end_to_end import EndToEndPipeline, clip_grad_norm


class _EndToEnd:
    """A method whose step ends in all processes together: what counts is the whole of a run.

    Args:
        shared: the model.
        cut: where the blocks begin.
        own: the numbers of this process's blocks.
        clip_group: over which the gradient's norm is summed; None where every process has the whole gradient.
    """

    def __init__(self, shared: SharedModel, cut: Cut, own: Sequence[int], clip_group: dist.ProcessGroup | None) -> None:
        self.shared = shared
        self.blocks = shared.blocks(cut, own)
        self._clip_group = clip_group
        self._optimizer = shared.optimizer(self.blocks)

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        """Runs the microbatches of a step forward and backward; the loss, where this process knows it."""
        raise NotImplementedError

    def run(self, microbatches: int, steps: int) -> Trial:
        sampler = self.shared.sampler(microbatches, steps)
        dist.barrier()
        begin = self.shared.now()
        for step in range(steps):
            batches = sampler.microbatches(step)
            loss = self.backward(batches, sum(batch.num_targets for batch in batches))
            clip_grad_norm(self._optimizer.parameters, OPTIM.max_grad_norm, self._clip_group)
            self._optimizer.step()
            if loss is not None:
                loss.item()  # A training logs it.
        return Trial(begin, self.shared.now())


class _TorchPipeline(_EndToEnd):
    """A schedule of `torch.distributed.pipelining`, as `pipeline` runs it."""

    schedule: ClassVar[str]
    pipeline: ClassVar[type[EndToEndPipeline]] = EndToEndPipeline
    num_blocks: ClassVar[int] = 2

    def __init__(self, shared: SharedModel, cut: Cut) -> None:
        super().__init__(shared, cut, self.own(shared.rank), shared.group)
        self._pipeline = self.pipeline(
            self.blocks,
            shared.group,
            shared.device,
            config=shared.config_of_stages,
            objective=ObjectiveConfig(),
            schedule=self.schedule,
        )

    def own(self, rank: int) -> list[int]:
        """The numbers of the blocks that process `rank` holds."""
        return [rank]

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        return self._pipeline.step(batches, num_targets)


class GPipe(_TorchPipeline):
    label: ClassVar[str] = "GPipe"
    schedule: ClassVar[str] = "GPipe"


class OneForwardOneBackward(_TorchPipeline):
    """With one microbatch per step, which torch's class refuses, 1F1B's order of work is GPipe's, and that one runs."""

    label: ClassVar[str] = "1F1B"
    schedule: ClassVar[str] = "1F1B"


class OwnShapes(OneForwardOneBackward):
    """1F1B whose microbatches keep the shapes of their own rows; torch's pads those of a step alike."""

    label: ClassVar[str] = "1F1B, own shapes"
    pipeline: ClassVar[type[EndToEndPipeline]] = OwnShapesPipeline


class ZeroBubble(_TorchPipeline):
    label: ClassVar[str] = "zero-bubble"
    schedule: ClassVar[str] = "InterleavedZeroBubble"
    num_blocks: ClassVar[int] = 2 * PROCESSES

    def own(self, rank: int) -> list[int]:
        return [rank, rank + PROCESSES]


class ZeroBubbleV(_TorchPipeline):
    label: ClassVar[str] = "ZB-V"
    schedule: ClassVar[str] = "ZBVZeroBubble"
    num_blocks: ClassVar[int] = 2 * PROCESSES

    def own(self, rank: int) -> list[int]:
        return [rank, self.num_blocks - 1 - rank]


class _Block(nn.Module):
    """A block with the task loss on its end, if it is the last, for loops written here."""

    def __init__(self, block: BlockModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.block = block
        self._dtype = dtype
        self._objective = task_objective(ObjectiveConfig())

    def forward(self, batch: Microbatch, hidden_states: torch.Tensor | None, num_targets: int) -> torch.Tensor:
        with torch.autocast(batch.input_ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            if hidden_states is None:
                output = self.block(input_ids=batch.input_ids, leave_logits=True)
            else:
                output = self.block(hidden_states=hidden_states.float(), leave_logits=True)
            if self.block.spec.is_last:
                return self._objective(output, batch) / num_targets
            return output.hidden_states.to(self._dtype).contiguous()


class Naive(_EndToEnd):
    """Both halves in turn, as `device_map` runs them: while one computes, the other waits."""

    num_blocks: ClassVar[int] = 2
    label: ClassVar[str] = "naive"

    def __init__(self, shared: SharedModel, cut: Cut) -> None:
        super().__init__(shared, cut, [shared.rank], shared.group)
        self._block = _Block(self.blocks[0], shared.dtype)

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        shared, losses = self.shared, []
        for batch in (batch.to(shared.device) for batch in batches):
            shape = (*batch.input_ids.shape, shared.config.hidden_size)
            received = torch.empty(shape, dtype=shared.dtype, device=shared.device)
            if shared.rank == 0:
                output = self._block(batch, None, num_targets)
                dist.send(output.detach(), 1, shared.group)
                dist.recv(received, 1, shared.group)
                output.backward(received)
            else:
                dist.recv(received, 0, shared.group)
                loss = self._block(batch, received.requires_grad_(), num_targets)
                loss.backward()
                assert received.grad is not None
                dist.send(received.grad, 0, shared.group)
                losses.append(loss.detach())
        return torch.stack(losses).sum() if losses else None


class DataParallel(_EndToEnd):
    """The whole model in each process, half the microbatches each; of a single microbatch half the rows each."""

    num_blocks: ClassVar[int] = 1
    label: ClassVar[str] = "DDP"

    def __init__(self, shared: SharedModel, cut: Cut) -> None:
        super().__init__(shared, cut, [0], None)
        whole = _Block(self.blocks[0], shared.dtype)
        self._replica = DistributedDataParallel(whole, process_group=shared.group, gradient_as_bucket_view=True)

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        rank, device = self.shared.rank, self.shared.device
        own = [_half_the_rows(batches[0], rank)] if len(batches) == 1 else list(batches[rank::PROCESSES])
        losses = []
        for batch in own[:-1]:
            with self._replica.no_sync():
                losses.append(self._one(batch.to(device), num_targets))
        losses.append(self._one(own[-1].to(device), num_targets))
        return torch.stack(losses).sum()

    def _one(self, batch: Microbatch, num_targets: int) -> torch.Tensor:
        # DDP takes the mean over the processes, of what is a sum here.
        loss = self._replica(batch, None, num_targets) * PROCESSES
        loss.backward()
        return loss.detach()


def _half_the_rows(batch: Microbatch, rank: int) -> Microbatch:
    own = slice(rank, None, PROCESSES)
    return batch.with_tensors(
        input_ids=batch.input_ids[own], labels=batch.labels[own], token_mask=batch.token_mask[own]
    )


METHODS: dict[str, type[Method]] = {
    "lopt": LocalLearning,
    "1f1b": OneForwardOneBackward,
    "gpipe": GPipe,
    "zero_bubble": ZeroBubble,
    "zbv": ZeroBubbleV,
    "naive": Naive,
    "ddp": DataParallel,
}

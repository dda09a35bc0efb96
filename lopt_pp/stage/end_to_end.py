"""End-to-end training of the same blocks: the gradient of the task loss goes back through every boundary.

It is what local learning is measured against. The pipeline is PyTorch's own, `torch.distributed.pipelining`, so that
the comparison is with what a user would take instead. That pipeline wants all microbatches of a step in one shape, so
they are padded alike.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

from lopt_pp.config.compute import StageConfig
from lopt_pp.data import IGNORE_INDEX, Microbatch
from lopt_pp.model.block import BlockModel
from lopt_pp.objectives import ObjectiveConfig, task_objective
from lopt_pp.stage.activation_offload import kept_for_backward
from lopt_pp.stage.base import Measure
from lopt_pp.stage.compute import prepare_block
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.util.host_waits import on_host
from lopt_pp.util.seeds import derive_seed

_RUNS_AHEAD = 2
"""Microbatches of an evaluation that may wait between two blocks."""


class EndToEndPipeline:
    """The blocks of one process, trained end to end together with those of the other processes of its pipeline.

    It makes gradients; clipping them (`clip_grad_norm`) and the optimizer's step are the caller's. Gradients add up
    where parameters have some, so the caller drops them after its step, and a gradient mean over replicas of the
    pipeline is a sum over them when each is given the count of all.

    Args:
        blocks: of this process, in order, with their weights, on `device`: one block, or several for a schedule that
            interleaves them (`InterleavedZeroBubble`: every `size`-th; `ZBVZeroBubble`: one on the way down, one on
            the way back up).
        group: the pipeline's processes; a process's rank in it is its position. None where this process is all.
        device: that this process computes on.
        config: how the blocks compute.
        objective: says what the task's loss is.
        schedule: as `torch.distributed.pipelining` names it.
        seed: dropout is a function of (seed, block, step, microbatch).
        replicas: of the pipeline, to sum the gradients over; None if there is only this one.

    Raises:
        ValueError: there is no such schedule.
    """

    def __init__(
        self,
        blocks: Sequence[BlockModel],
        group: dist.ProcessGroup | None,
        device: torch.device | str = "cpu",
        *,
        config: StageConfig,
        objective: ObjectiveConfig,
        schedule: str = "1F1B",
        seed: int = 0,
        replicas: Replicas | None = None,
    ) -> None:
        self._modules = [
            PipelineModule(
                prepare_block(block, config, torch.device(device)),
                config,
                seed,
                splits_backward="Bubble" in schedule,
                objective=objective,
            )
            for block in blocks
        ]
        self.task = self._modules[-1].objective
        # The wrappers take the mean.
        self._num_replicas = replicas.size if replicas else 1
        self.wrapped = [replicas.replicate(module) if replicas else module for module in self._modules]
        self._group = group if group is not None and group.size() > 1 else None
        self._device = torch.device(device)
        self._dtype = config.compute_dtype
        self._schedule_class = get_schedule_class(schedule)
        self._built_for: tuple[int, ...] | None = None
        self._schedule: Any = None

    def step(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        """Adds the gradient of one optimizer step's loss, the mean over its target tokens, to the parameters.

        Args:
            batches: the microbatches of the step, on the CPU, the same in every process.
            num_targets: the number of target tokens of the whole step, which the loss is divided by.

        Returns:
            The step's loss, a float32 scalar, in the process that holds the last block; None in the others.
        """
        if self._group is None:
            (module,) = self._modules
            module.begin([batch.to(self._device) for batch in batches], num_targets)
            losses = []
            for index in range(len(batches)):
                loss = module(index=torch.tensor([index]))
                loss.backward()
                losses.append(loss.detach())
        else:
            losses = self._run_schedule(batches, num_targets)
        return torch.stack(losses).sum() if losses else None

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Microbatch], measure: Measure | None = None) -> list[torch.Tensor]:
        """Runs microbatches forward, without dropout, one after another; each block may run ahead of the next.

        Schedules want one shape and keep what backward needs; here each microbatch has its own, and nothing is kept.

        Args:
            batches: on the CPU, the same in every process, of which each has one block.
            measure: makes their loss, in place of the task's.

        Returns:
            The loss of each, summed over its target tokens, in the process that holds the last block.
        """
        (module,), losses = self._modules, []
        spec, hidden_size = module.block.spec, module.block.model.config.hidden_size
        on_their_way: deque[tuple[dist.Work, torch.Tensor]] = deque()
        module.eval().measure = measure
        for batch in batches:
            module.begin([batch.to(self._device)], 1)
            hidden_states = None
            if not spec.is_first:
                shape = *batch.input_ids.shape, hidden_size
                hidden_states = torch.empty(shape, dtype=self._dtype, device=self._device)
                dist.recv(hidden_states, group=self._group, group_src=spec.stage - 1)
            output = module(hidden_states, index=torch.tensor([0]))
            if spec.is_last:
                losses.append(output)
                continue
            work = dist.isend(output, group=self._group, group_dst=spec.stage + 1)
            assert work is not None
            on_their_way.append((work, output))
            if len(on_their_way) > _RUNS_AHEAD:
                on_their_way.popleft()[0].wait()
        for work, _ in on_their_way:
            work.wait()
        module.begin((), 0)
        module.train()
        module.measure = None
        return losses

    def _run_schedule(self, batches: Sequence[Microbatch], num_targets: int) -> list[torch.Tensor]:
        """Runs the microbatches through the schedule; returns their losses in the process that has the last block."""
        batches = [batch.to(self._device) for batch in pad_alike(batches)]
        shape = (len(batches), *batches[0].input_ids.shape)
        if shape != self._built_for:
            # One schedule is kept and not one per shape: building costs a message to the last block and back, a
            # schedule holds receive buffers for all microbatches of a step.
            self._schedule, self._built_for = self._build_schedule(*shape), shape
        for module in self._modules:
            module.begin(batches, num_targets)
        # The schedule cuts tensors into microbatches itself. It is given their numbers, which never leave the CPU, and
        # each block finds by the number what the data order has made for it.
        numbers = torch.arange(len(batches))
        losses: list[torch.Tensor] = []
        self._schedule.step(index=numbers, target=numbers, losses=losses, return_outputs=False)
        for module in self._modules:
            module.begin((), 0)
        return [loss.detach() / self._num_replicas for loss in losses]

    def _build_schedule(self, num_microbatches: int, sequences: int, tokens: int) -> Any:
        stages = [
            self._build_stage(*modules, sequences, tokens) for modules in zip(self._modules, self.wrapped, strict=True)
        ]
        schedule = self._schedule_class
        if schedule is get_schedule_class("1F1B") and num_microbatches < stages[0].num_stages:
            # 1F1B refuses such a step. Its bubble would be GPipe's: all forwards are through before a backward comes
            # back to the first block.
            schedule = get_schedule_class("GPipe")
        several = issubclass(schedule, PipelineScheduleMulti)
        return schedule(
            stages if several else stages[0],
            n_microbatches=num_microbatches,
            # The last block's output is the microbatch's share of the loss already.
            loss_fn=lambda loss, _: loss * self._num_replicas,
            scale_grads=False,
        )

    def _build_stage(self, module: "PipelineModule", wrapped: nn.Module, sequences: int, tokens: int) -> PipelineStage:
        spec, hidden_size = module.block.spec, module.block.model.config.hidden_size
        # Only a description. Without it every new shape would cost a forward and a backward to find it out.
        shape = sequences, tokens, hidden_size
        hidden_states = torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        return PipelineStage(
            wrapped,
            spec.stage,
            spec.num_stages,
            self._device,
            input_args=() if spec.is_first else (hidden_states,),
            output_args=(loss if spec.is_last else hidden_states,),
            group=self._group,
        )


class PipelineModule(nn.Module):
    """A block as the schedules run it: hidden states in (but on the first) and out; the loss out of the last.

    Args:
        block: the block.
        config: how it computes.
        seed: of the run.
        splits_backward: whether the schedule runs backward in two passes, which the chunked loss does not bear.
        objective: says what the task's loss is.
    """

    def __init__(
        self, block: BlockModel, config: StageConfig, seed: int, splits_backward: bool, objective: ObjectiveConfig
    ) -> None:
        super().__init__()
        self.block = block
        self._config = config
        self._seed = seed
        self._splits_backward = splits_backward
        self.objective = task_objective(objective, measures=True)
        self.measure: Measure | None = None
        self.begin((), 0)

    def begin(self, batches: Sequence[Microbatch], num_targets: int) -> None:
        """Takes the microbatches of a step, on the device, and the count of its target tokens."""
        self._batches = batches
        self._num_targets = max(num_targets, 1)

    def forward(self, hidden_states: torch.Tensor | None = None, *, index: torch.Tensor) -> torch.Tensor:
        """Runs the block on one microbatch.

        Args:
            hidden_states: `[sequences, tokens, hidden]` from the block before; None on the first.
            index: int64 `[1]`, on the CPU: the microbatch's number within the step.
        """
        with on_host():
            batch = self._batches[int(index)]
        torch.manual_seed(derive_seed(self._seed, self.block.spec.stage, batch.step, batch.index))
        config, device = self._config, batch.input_ids.device
        autocast = torch.autocast(device.type, config.compute_dtype, enabled=config.autocasts)
        with kept_for_backward(config, device), autocast:
            wanted = batch.for_block | {"leave_logits": not self._splits_backward}
            if hidden_states is None:
                output = self.block(input_ids=batch.input_ids, **wanted)
            else:
                output = self.block(hidden_states=hidden_states.to(config.parameter_dtype), **wanted)
            if self.block.spec.is_last:
                return (self.measure or self.objective)(output, batch) / self._num_targets
            return output.hidden_states.to(config.compute_dtype).contiguous()


def pad_alike(batches: Sequence[Microbatch]) -> list[Microbatch]:
    """The microbatches, padded with empty sequences and tokens to the largest count of each; their losses are the same.

    The padding has the token id 0, which matters no more than any other: no real token sees it, no loss counts it.
    """
    sequences = max(batch.input_ids.shape[0] for batch in batches)
    tokens = max(batch.input_ids.shape[1] for batch in batches)
    padded = []
    for batch in batches:
        missing = (0, tokens - batch.input_ids.shape[1], 0, sequences - batch.input_ids.shape[0])
        padded.append(
            batch.with_tensors(
                input_ids=F.pad(batch.input_ids, missing),
                labels=F.pad(batch.labels, missing, value=IGNORE_INDEX),
                token_mask=F.pad(batch.token_mask, missing),
                position_ids=None if batch.position_ids is None else F.pad(batch.position_ids, missing),
            )
        )
    return padded


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Clips the norm of the whole model's gradient, whose parts the processes of `group` hold.

    Args:
        parameters: of this process.
        max_norm: what the norm is clipped to; 0 is off.
        group: the pipeline's processes, all of which must call this; None where this process is all.

    Returns:
        The norm over all parameters of all processes, from before: a float32 scalar.
    """
    own = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in own if parameter.grad is not None])
    if group is not None:
        squared = norm.square()
        dist.all_reduce(squared, group=group)
        norm = squared.sqrt()
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(own, max_norm, norm)
    return norm

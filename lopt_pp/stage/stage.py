"""One stage: a block with its local objective and its optimizer. Knows no other stage and no communication."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch

from lopt_pp.config.compute import PLAIN, StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.objectives import Objective
from lopt_pp.stage.accumulation import learned_microbatches, without_sync
from lopt_pp.stage.activation_offload import kept_for_backward
from lopt_pp.stage.base import BaseStage, Clock, Measure, check_finite, untimed
from lopt_pp.stage.compute import measuring, prepare_block, prepare_objective
from lopt_pp.stage.data_parallel import Replicas, Replicated, reshard
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.optimizer_kinds import OptimizerFactory, ParameterFacts
from lopt_pp.util.seeds import derive_seed

_FROZEN = "stands"
"""In the saved state of a stage whose learning has ended. (A key of checkpoints: its name stays.)"""


class Stage(BaseStage):
    """Trains one block by its own loss, or only runs it forward.

    Args:
        block: the block, with its weights.
        objective: what it learns from; None for a block that is frozen.
        optim: learning rates and the optimizer.
        num_steps: of the whole run, for the schedule.
        config: how it computes.
        local_head_warmup_steps: at the beginning of the run, in which the block is frozen and its objective learns.
        local_accumulation_steps: of a step's microbatches, those that a stage before the last learns from; None is all.
        seed: of the run. Dropout is a function of (seed, stage, step, microbatch), whatever process runs it.
        device: where the stage lives.
        replicas: the processes that hold the same stage; None if there is only this one.
        optimizer_factory: makes the optimizer in the place of the one that `optim` names.
    """

    def __init__(
        self,
        block: BlockModel,
        objective: Objective | None,
        optim: OptimConfig,
        num_steps: int,
        *,
        config: StageConfig = PLAIN,
        local_head_warmup_steps: int = 0,
        local_accumulation_steps: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        replicas: Replicas | None = None,
        optimizer_factory: OptimizerFactory | None = None,
    ) -> None:
        super().__init__(prepare_block(block, config, torch.device(device)), device)
        self.objective = objective
        self.dtype = config.compute_dtype
        self.replicas, self.num_replicas = replicas, replicas.size if replicas else 1
        self.is_sharded = replicas is not None and replicas.sharded
        self._autocasts = config.autocasts
        self._saved = kept_for_backward(config, self.device)
        self._compiles = config.compiles
        self._parameter_dtype = config.parameter_dtype
        self._seed = seed
        self._run: Callable[..., BlockOutput] = block
        self._loss: Callable[[BlockOutput, Microbatch], torch.Tensor] | None = objective
        self._ddp: list[Replicated] = []
        self._warmup_steps = 0
        self._accumulation_steps = None if block.spec.is_last else local_accumulation_steps
        self._losses: dict[int, torch.Tensor] = {}
        self._is_frozen = self._measures = False
        self._measure: Measure | None = None
        # Without a loss the block only runs forward: nothing below is for it.
        if objective is None:
            block.eval().requires_grad_(False)
            self.side.changed()
            return
        self._modules["objective"] = objective
        prepare_objective(objective, config, self.device)
        if any(parameter.requires_grad for parameter in objective.parameters()):
            self._warmup_steps = local_head_warmup_steps
        # A wrapper for each: the block may be frozen while its head warms up, and then has no gradient to wait for.
        if replicas:
            self._run, self._loss = joined = replicas.join(block), replicas.join(objective)
            self._ddp = [module for module in joined if isinstance(module, Replicated)]
        rate = head_rate = optim.learning_rate
        if not block.spec.is_last:
            rate, head_rate = optim.rates_of_earlier_stage(objective.rate_share)
        own, heads, facts = block.parameters(), objective.parameters(), ParameterFacts.of(self._modules)
        self.optimizer = Optimizer(own, optim, rate, num_steps, heads, head_rate, facts, optimizer_factory)
        self.side.changed()

    @property
    def block_learns(self) -> bool:
        """Whether the block learns in the coming step; it may be frozen while its head warms up."""
        return self.learns and self.steps_done >= self._warmup_steps

    def learned_microbatches(self, step: int, num_microbatches: int) -> list[int]:
        """The microbatches that the stage learns from, by their place in its replica's part of a step; ascending.

        Args:
            step: of the run.
            num_microbatches: in the replica's part of it.
        """
        return learned_microbatches(step, num_microbatches, self._accumulation_steps) if self.learns else []

    def learned_share(self, accumulation: int) -> float:
        """Of the microbatches of a step, `accumulation` in each replica, the share that the stage learns from."""
        return len(self.learned_microbatches(0, accumulation)) / accumulation

    def freeze(self) -> None:
        """Ends the stage's learning, between two steps: from here on its block only runs forward, and stays as it is.

        The objective and the optimizer are let go. All replicas of the stage must call this after the same step.
        """
        with self.updating:
            if self.optimizer is not None:
                self.optimizer.settle()
            self.block.eval()
            self._run = self.block
            self.block.zero_grad()  # DDP keeps gradients from step to step.
            self.objective = self._loss = self.optimizer = None
            self._ddp = []
            self._modules = {"block": self.block.model}
            self._is_frozen = True

    def count(self, counts: TokenCounts) -> int:
        """Of the tokens of a step, the number that the stage's loss counts."""
        assert self.objective is not None
        return self.objective.count(counts)

    def run_microbatch(
        self,
        batch: Microbatch,
        hidden_states: torch.Tensor | None,
        send: Callable[[torch.Tensor], None] | None = None,
        *,
        step_count: int | None = None,
        is_last: bool = True,
        clock: Clock = untimed,
    ) -> torch.Tensor | None:
        """One microbatch: forward, on to the next stage, then the stage's own loss and its backward.

        Within `evaluating` the loss is measured, and nothing goes backward.

        Args:
            batch: the microbatch, on the stage's device.
            hidden_states: `[sequences, tokens, hidden]` from the stage before; None on the first.
            send: hands on what the next stage gets, `outgoing`; None on the last stage.
            step_count: the number of tokens that the loss counts in the whole optimizer step, over all replicas; None
                where the stage is not to learn from this microbatch.
            is_last: whether it is the last of its step that the stage learns from.
            clock: times the phases `forward` and `backward`.

        Returns:
            The loss that was measured, summed over the tokens that count, a float32 scalar; None in training, and of a
            stage that has no loss.
        """
        learns, measured = step_count is not None or self._measures, None
        with without_sync(() if learns and is_last else self._ddp):
            with clock("forward"):
                output = self.forward(batch, hidden_states, learns)
            # The next stage can begin while this one goes backward.
            if send is not None:
                send(self.outgoing(output))
            if self._measures and self.objective is not None:
                with clock("forward"):
                    measured = self.summed_loss(output, batch)
            elif step_count is not None:
                with clock("forward"):
                    loss = self.loss(output, batch, step_count)
                with clock("backward"):
                    loss.backward()
        return measured

    def forward(self, batch: Microbatch, hidden_states: torch.Tensor | None, learns: bool = True) -> BlockOutput:
        """Runs the block on one microbatch.

        Args:
            batch: the microbatch, on the stage's device.
            hidden_states: `[sequences, tokens, hidden]` from the stage before; None on the first.
            learns: whether `loss` of this output is to be learned from; otherwise there is no gradient.
        """
        torch.manual_seed(derive_seed(self._seed, self.index, batch.step, batch.index))
        wanted = batch.for_block | {"leave_logits": True}
        # Measured, it runs without what wraps it for training: nothing is to be heard of a gradient.
        run = self.block if self._measures else self._run
        with self._saved, self._autocast(), torch.set_grad_enabled(learns and self.block_learns and not self._measures):
            if self.block.spec.is_first:
                output = run(input_ids=batch.input_ids, **wanted)
            else:
                # With weights in float32 so is all that the blocks add to; only the crossing itself is rounded.
                assert hidden_states is not None
                output = run(hidden_states=hidden_states.to(self._parameter_dtype), **wanted)
        if not learns and self.is_sharded:
            reshard(self.block.modules())
        return output

    def probe(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the block, on any stage but the last, makes of some inputs as it is now; training does not notice.

        Sharded replicas must all call this. Dropout is off.

        Args:
            inputs: int64 token ids, `[sequences, tokens]`, on the first stage; else `[sequences, tokens, hidden]`.

        Returns:
            What the next stage would get: `[sequences, tokens, hidden]`.
        """
        with self.evaluating(), self._autocast():
            if self.block.spec.is_first:
                output = self.block(input_ids=inputs)
            else:
                output = self.block(hidden_states=inputs.to(self._parameter_dtype))
        return self.outgoing(output)

    def outgoing(self, output: BlockOutput) -> torch.Tensor:
        """What the next stage gets: the hidden states, detached, contiguous and in the compute dtype."""
        return output.hidden_states.detach().to(self.dtype).contiguous()

    def loss(self, output: BlockOutput, batch: Microbatch, step_count: int) -> torch.Tensor:
        """The microbatch's share of the step's mean loss, weighted, ready for backward.

        Args:
            output: of `forward`.
            batch: the same microbatch.
            step_count: the number of counted tokens in the whole optimizer step, over all replicas.
        """
        assert self.objective is not None and self._loss is not None
        with self._saved, self._autocast():
            loss = self._loss(output, batch) / max(step_count, 1)
        self._losses[batch.index] = loss.detach()
        # The replicas' gradients are averaged, and are to be summed.
        return loss * (self.objective.weight * self.num_replicas)

    def summed_loss(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        """The loss summed over the microbatch's tokens that count, unweighted: a float32 scalar."""
        assert self.objective is not None
        with self._autocast():
            return (self._measure or self.objective)(output, batch)

    @contextlib.contextmanager
    def evaluating(self, measure: Measure | None = None) -> Iterator[None]:
        """While it lasts, `forward` and `summed_loss` measure: no dropout, no gradient, and all ends as it was.

        Replicas that hold a shard each must all run as many microbatches meanwhile. `measure` is for the objective.
        """
        parts = [module for own in (self.block, self.objective) if own is not None for module in own.modules()]
        self._measures, self._measure = True, measure
        try:
            with self.averaged(), measuring(parts, self._compiles):
                yield
                reshard(parts)  # What was gathered is of the weights as they were.
        finally:
            self._measures, self._measure = False, None
            reshard(parts)

    def _marks(self) -> dict[str, torch.Tensor]:
        return super()._marks() | ({_FROZEN: torch.tensor(True)} if self._is_frozen else {})

    def resume(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None:
        if _FROZEN in state:
            self.freeze()
        super().resume(state, steps_done)

    def step(self, step: int) -> dict[str, float]:
        """Makes the optimizer step, once the losses and the gradient are known to be finite.

        Returns:
            This replica's share of the step's mean loss (unweighted), the gradient norm (before clipping) and the
            block's learning rate, by name; nothing of a stage that does not learn.

        Raises:
            NotFiniteError: before anything is changed.
        """
        if self.objective is None or self.optimizer is None:
            self.steps_done += 1
            return {}
        grad_norm = self.optimizer.clip()
        # The step's only wait for the device: a loss must be looked at before its gradient is applied.
        losses, self._losses = self._losses, {}
        like = next(iter(losses.values()))
        *values, norm = torch.stack([*losses.values(), grad_norm.to(like)]).tolist()
        named = {
            f"{self.objective.name} of step {step + 1}, microbatch {index + 1}": value
            for index, value in zip(losses, values, strict=True)
        }
        check_finite(self.index, step, named, norm)
        rate = self.optimizer.learning_rate if self.block_learns else 0.0
        record = {self.objective.name: sum(values), "grad_norm": norm, "learning_rate": rate}
        self.update({ddp: ddp.module is not self.block or self.block_learns for ddp in self._ddp})
        return record

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self.device.type, self.dtype, enabled=self._autocasts)

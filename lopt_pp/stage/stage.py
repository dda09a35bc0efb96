"""One stage: a block with its local objective and its optimizer. Knows no other stage and no communication."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn.parallel import DistributedDataParallel

from lopt_pp.config.compute import PLAIN, StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.errors import NotFiniteError
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.objectives import Objective
from lopt_pp.stage.compute import prepare_block, prepare_objective
from lopt_pp.stage.data_parallel import Replicas, reshard
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.state import read_state, write_state
from lopt_pp.util.seeds import derive_seed

_FROZEN = "stands"
"""In the saved state of a stage whose learning has ended."""


class Stage:
    """Trains one block by its own loss, or only runs it forward.

    Args:
        block: the block, with its weights.
        objective: what it learns from; None for a block that stands as it is.
        optim: learning rates and AdamW.
        num_steps: of the whole run, for the schedule.
        config: how it computes.
        local_head_warmup_steps: at the beginning of the run in which the block stands, and only its objective learns.
        local_accumulation_steps: of a step's microbatches, those that a stage before the last learns from; None is all.
        seed: of the run. Dropout is a function of (seed, stage, step, microbatch), whatever process runs it.
        device: where the stage lives.
        replicas: the processes that hold the same stage; None if there is only this one.
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
    ) -> None:
        self.device = torch.device(device)
        self.block = prepare_block(block, config, self.device)
        self.objective = objective
        self.index = block.spec.stage
        self.dtype = config.compute_dtype
        self.num_replicas = replicas.size if replicas else 1
        self.is_sharded = replicas is not None and replicas.sharded
        self._autocasts = config.autocasts
        self._compiles = config.torch_compile
        self._parameter_dtype = config.parameter_dtype
        self._seed = seed
        self._run: Callable[..., BlockOutput] = block
        self._loss: Callable[[BlockOutput, Microbatch], torch.Tensor] | None = objective
        self._ddp: list[DistributedDataParallel] = []
        self._warmup_steps = 0
        self._accumulation_steps = None if block.spec.is_last else local_accumulation_steps
        self._losses: dict[int, torch.Tensor] = {}
        self.steps_done = 0
        self._is_frozen = False
        self._measures = False
        self.updating = threading.Lock()
        """Held while weights change, so that another thread can save them between two steps."""
        self._modules: dict[str, torch.nn.Module] = {"block": block.model}
        self.optimizer: Optimizer | None = None
        if objective is None:
            block.eval().requires_grad_(False)
            return
        self._modules["objective"] = objective
        prepare_objective(objective, config, self.device)
        has_head = any(parameter.requires_grad for parameter in objective.parameters())
        if has_head:
            self._warmup_steps = local_head_warmup_steps
        if replicas and replicas.sharded:
            replicas.shard(block)
            replicas.shard(objective)
        elif replicas:
            self._run = replicas.replicate(block)
            self._ddp.append(self._run)
            if has_head:
                self._loss = replicas.replicate(objective)
                self._ddp.append(self._loss)
        rate = head_rate = optim.learning_rate
        if not block.spec.is_last:
            rate, head_rate = optim.rates_of_earlier_stage(objective.rate_share)
        self.optimizer = Optimizer(block.parameters(), optim, rate, num_steps, objective.parameters(), head_rate)

    @property
    def learns(self) -> bool:
        """Whether the stage has a loss; otherwise it only runs forward."""
        return self.objective is not None

    @property
    def block_learns(self) -> bool:
        """Whether the block learns in the coming step; it may stand while its head warms up."""
        return self.learns and self.steps_done >= self._warmup_steps

    def learned_microbatches(self, step: int, num_microbatches: int) -> list[int]:
        """The microbatches that the stage learns from, by their place in its replica's part of a step; ascending.

        Where these are not all of them, each has its turn from step to step: the longest rows may come first.

        Args:
            step: of the run.
            num_turns: microbatches in the replica's part of it.
        """
        if not self.learns:
            return []
        number = (
            num_microbatches if self._accumulation_steps is None else min(self._accumulation_steps, num_microbatches)
        )
        return sorted((step * number + place) % num_microbatches for place in range(number))

    def learned_share(self, accumulation: int) -> float:
        """Of the microbatches of a step, `accumulation` in each replica, the share that the stage learns from."""
        return len(self.learned_microbatches(0, accumulation)) / accumulation

    def freeze(self) -> None:
        """Ends the stage's learning, between two steps: from here on its block only runs forward, and stays as it is.

        The objective and the optimizer are let go. All replicas of the stage must call this after the same step.
        """
        with self.updating:
            self.block.eval()
            self._run = self.block
            self.objective = self._loss = self.optimizer = None
            self._ddp = []
            self._modules = {"block": self.block.model}
            self._is_frozen = True

    def count(self, counts: TokenCounts) -> int:
        """Of the tokens of a step, the number that the stage's loss counts."""
        assert self.objective is not None
        return self.objective.count(counts)

    def accumulating(self, is_last: bool) -> contextlib.AbstractContextManager:
        """For forward and backward of one microbatch: before the last of a step, replicas need not hear of each other.

        Sharded replicas add up their gradients in each microbatch, since none has room for all of them.
        """
        waiting = contextlib.ExitStack()
        for replica in () if is_last else self._ddp:
            waiting.enter_context(replica.no_sync())
        return waiting

    def forward(self, batch: Microbatch, hidden_states: torch.Tensor | None, learns: bool = True) -> BlockOutput:
        """Runs the block on one microbatch.

        Args:
            batch: the microbatch, on the stage's device.
            hidden_states: `[rows, tokens, hidden]` from the stage before; None on the first.
            learns: whether `loss` of this output is to be learned from; otherwise there is no gradient.
        """
        torch.manual_seed(derive_seed(self._seed, self.index, batch.step, batch.index))
        wanted = {"logits_to_keep": batch.target_positions, "leave_logits": True, "position_ids": batch.position_ids}
        # Measured, it runs without what wraps it for training: nothing is to be heard of a gradient.
        run = self.block if self._measures else self._run
        with self._autocast(), torch.set_grad_enabled(learns and self.block_learns and not self._measures):
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
            inputs: token ids, int64 `[rows, tokens]`, on the first stage; `[rows, tokens, hidden]` on the others.

        Returns:
            What the next stage would get: `[rows, tokens, hidden]`.
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
        with self._autocast():
            loss = self._loss(output, batch) / max(step_count, 1)
        self._losses[batch.index] = loss.detach()
        # The replicas' gradients are averaged, and are to be summed.
        return loss * (self.objective.weight * self.num_replicas)

    def summed_loss(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        """The loss summed over the microbatch's tokens that count, unweighted: a float32 scalar."""
        assert self.objective is not None
        with self._autocast():
            return self.objective(output, batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it lasts, `forward` and `summed_loss` measure: no dropout, no gradient, and all ends as it was.

        Replicas that hold a share each must all run the same number of microbatches meanwhile.
        """
        parts = [module for own in (self.block, self.objective) if own is not None for module in own.modules()]
        modes = [module.training for module in parts]
        for module in parts:
            module.training = False
        self._measures = True
        # Compiled layers would be compiled once more, for other shapes.
        eager = torch.compiler.set_stance("force_eager") if self._compiles else contextlib.nullcontext()
        try:
            with torch.no_grad(), eager:
                yield
        finally:
            self._measures = False
            for module, mode in zip(parts, modes, strict=True):
                module.training = mode
            reshard(parts)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of all that the next step depends on. Sharded replicas must all call this."""
        state = read_state(self._modules, self.optimizer)
        return state | {_FROZEN: torch.tensor(True)} if self._is_frozen else state

    def resume(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Goes on from what `state` gave after `steps_done` steps, in this layout of replicas or another.

        Raises:
            LoptError: it is another stage's.
        """
        if _FROZEN in state:
            self.freeze()
        write_state(state, self._modules, self.optimizer, steps_done)
        self.steps_done = steps_done

    def resume_weights(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Goes on from the weights among other stages' `state`, with an optimizer and a local head that start anew.

        Raises:
            LoptError: a tensor of this stage is missing or of another shape.
        """
        write_state(state, {"block": self.block.model}, None, steps_done)
        if self.optimizer is not None:
            self.optimizer.resume({}, steps_done)
        self.steps_done = steps_done

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
        for index, value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"stage {self.index}: the {self.objective.name} of step {step + 1}, microbatch {index + 1} is "
                    f"{value}; a lower learning rate, --max_grad_norm or --dtype float32 may help, or look at its rows"
                )
        check_norm(norm, self.index, step)
        rate = self.optimizer.learning_rate if self.block_learns else 0.0
        record = {self.objective.name: sum(values), "grad_norm": norm, "learning_rate": rate}
        with self.updating:
            self.optimizer.step()
            self.steps_done += 1
        return record

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self._autocasts)


def check_norm(norm: float, stage: int, step: int) -> None:
    """Raises NotFiniteError unless the gradient norm of the step is finite."""
    if not math.isfinite(norm):
        raise NotFiniteError(f"stage {stage}: the gradient norm of step {step + 1} is {norm}; lower the learning rate")

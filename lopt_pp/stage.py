"""One stage: a block with its local objective and its optimizer. Knows no other stage and no communication."""

import contextlib
import hashlib
import math
import threading

import torch

from lopt_pp.data import Microbatch
from lopt_pp.errors import LoptError
from lopt_pp.objectives import NextToken, Objective, Reconstruction
from lopt_pp.optim import OptimConfig, Optimizer
from lopt_pp.split import BlockModel, BlockOutput


class NotFiniteError(LoptError):
    """A loss or a gradient that is not finite. The stage's weights are those of the last good step."""


def local_objective(block: BlockModel, weight: float, seed: int) -> Objective:
    """The objective of the block: the task on the last one, reconstruction elsewhere."""
    if block.span.is_last:
        return NextToken()
    hidden_size = block.model.config.hidden_size
    return Reconstruction(hidden_size, weight, torch.Generator().manual_seed(_seed(seed, block.span.stage)))


class Stage:
    """Trains one block by its own loss.

    The parameters, their gradients and AdamW's state are float32. With `dtype` bfloat16 the block computes under
    autocast, and hands on its hidden states in bfloat16.

    Args:
        block: the block, with its weights.
        objective: what it learns from.
        optim: learning rates and AdamW.
        num_steps: of the whole run, for the schedule.
        dtype: of the computation and of the hidden states that leave the stage: float32 or bfloat16.
        seed: of the run. Dropout is a function of (seed, stage, step, microbatch), whatever process runs it.
        device: where the stage lives.
    """

    def __init__(
        self,
        block: BlockModel,
        objective: Objective,
        optim: OptimConfig,
        num_steps: int,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.block = block.to(self.device).train()
        self.objective = objective
        if isinstance(objective, torch.nn.Module):
            objective.to(self.device)
        self.index = block.span.stage
        self.dtype = dtype
        self._seed = seed
        parameters = [*block.parameters(), *(objective.parameters() if isinstance(objective, torch.nn.Module) else ())]
        self.optimizer = Optimizer(parameters, optim, optim.peak_learning_rate(block.span.is_last), num_steps)
        self._losses: list[torch.Tensor] = []
        self.steps_done = 0
        self.updating = threading.Lock()
        """Held while weights change, so that another thread can save them between two steps."""

    def forward(self, batch: Microbatch, hidden_states: torch.Tensor | None) -> BlockOutput:
        """Runs the block on one microbatch.

        Args:
            batch: the microbatch, on the stage's device.
            hidden_states: `[rows, tokens, hidden]` from the stage before; None on the first.
        """
        torch.manual_seed(_seed(self._seed, self.index, batch.step, batch.index))
        with self._autocast():
            if self.block.span.is_first:
                return self.block(input_ids=batch.input_ids, logits_to_keep=batch.target_positions)
            # Float32 again, as everything that the blocks add to; only the crossing itself is rounded.
            assert hidden_states is not None
            return self.block(hidden_states=hidden_states.float(), logits_to_keep=batch.target_positions)

    def outgoing(self, output: BlockOutput) -> torch.Tensor:
        """What the next stage gets: the hidden states, detached, contiguous and in the compute dtype."""
        return output.hidden_states.detach().to(self.dtype).contiguous()

    def loss(self, output: BlockOutput, batch: Microbatch, step_count: int) -> torch.Tensor:
        """The microbatch's share of the step's mean loss, weighted, ready for backward.

        Args:
            output: of `forward`.
            batch: the same microbatch.
            step_count: the number of counted tokens in the whole optimizer step.
        """
        with self._autocast():
            loss = self.objective(output, batch) / max(step_count, 1)
        self._losses.append(loss.detach())
        return loss * self.objective.weight

    def step(self, step: int) -> dict[str, float]:
        """Makes the optimizer step, once the losses and the gradient are known to be finite.

        Returns:
            The step's mean loss (unweighted), gradient norm (before clipping) and learning rate, by name.

        Raises:
            NotFiniteError: before anything is changed.
        """
        grad_norm = self.optimizer.clip()
        # The step's only wait for the device: a loss must be looked at before its gradient is applied.
        *losses, norm = torch.stack([*self._losses, grad_norm.to(self._losses[0])]).tolist()
        self._losses = []
        for index, value in enumerate(losses):
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"stage {self.index}: the {self.objective.name} of step {step + 1}, microbatch {index + 1} is "
                    f"{value}; a lower learning rate, --max_grad_norm or --dtype float32 may help, or look at its rows"
                )
        if not math.isfinite(norm):
            raise NotFiniteError(
                f"stage {self.index}: the gradient norm of step {step + 1} is {norm}; lower the learning rate"
            )
        record = {self.objective.name: sum(losses), "grad_norm": norm, "learning_rate": self.optimizer.learning_rate}
        with self.updating:
            self.optimizer.step()
            self.steps_done += 1
        return record

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def _seed(*parts: int) -> int:
    """A seed of its own for each tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")

"""The optimizer and learning-rate schedule of one stage."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lopt_pp.config.optim import OptimConfig
from lopt_pp.errors import LoptError


class Optimizer:
    """AdamW with its schedule and gradient clipping, over the parameters of one stage.

    Args:
        parameters: of the block.
        config: as given by the user.
        learning_rate: their peak.
        num_steps: of the whole run.
        head: more parameters, of the block's own objective.
        head_learning_rate: their peak.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimConfig,
        learning_rate: float,
        num_steps: int,
        head: Iterable[nn.Parameter] = (),
        head_learning_rate: float = 0.0,
    ) -> None:
        # Block and head have rates of their own; within each, biases and norms are not decayed.
        owners = [
            ([parameter for parameter in own if parameter.requires_grad], rate)
            for own, rate in ((parameters, learning_rate), (head, head_learning_rate))
        ]
        self.parameters = [parameter for own, _ in owners for parameter in own]
        groups: list[dict[str, Any]] = []
        for own, rate in owners:
            matrices, vectors = ([p for p in own if (p.ndim < 2) == is_vector] for is_vector in (False, True))
            groups.append({"params": matrices, "lr": rate, "weight_decay": config.weight_decay})
            groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
        self.max_grad_norm = config.max_grad_norm
        self.is_fused = config.optim == "adamw_torch_fused"
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=self.is_fused,
        )
        warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
        try:
            schedule = get_scheduler(config.lr_scheduler_type, self.adamw, warmup, num_steps)
        except (TypeError, ValueError) as error:
            raise LoptError(
                f"--lr_scheduler_type {config.lr_scheduler_type} needs settings that have no flag ({error}); take "
                f"another"
            ) from error
        assert isinstance(schedule, LambdaLR)  # All of transformers are that do not follow a metric.
        self.schedule = schedule

    @property
    def learning_rate(self) -> float:
        """Of the block, for the coming step."""
        return float(self.schedule.get_last_lr()[0])

    def clip(self) -> torch.Tensor:
        """Clips the gradient, and returns its norm from before: a float32 scalar. Of sharded parameters, over all."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()

    def state_of(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """AdamW's state of a parameter, by name; empty before the first step."""
        return self.adamw.state.get(parameter, {})

    def resume(self, states: Mapping[nn.Parameter, dict[str, torch.Tensor]], steps_done: int) -> None:
        """Goes on after `steps_done` steps.

        Args:
            states: AdamW's state of each parameter, where and as it is to be; none for one that starts anew.
            steps_done: for the schedule of the rate.
        """
        for parameter, state in states.items():
            self.adamw.state[parameter] = state
        # The schedules of transformers are functions of the step, so their place is all their state. A new one takes
        # its first step when it is made, which is that of the place after `last_epoch`, and sets the rates.
        self.schedule = LambdaLR(self.adamw, self.schedule.lr_lambdas, last_epoch=steps_done - 1)

    def step(self) -> None:
        """Applies the gradient, drops it, and moves the schedule on."""
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.schedule.step()

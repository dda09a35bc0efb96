"""The optimizer and learning-rate schedule of one stage."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import SchedulerType, get_scheduler

from lopt_pp.errors import LoptError, shown
from lopt_pp.flags import check_types

_FOLLOW_A_METRIC = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates, AdamW and the schedule; every stage has its own."""

    _argument_group_name: ClassVar[str] = "Optimizer"

    learning_rate: float = field(
        default=2e-5, metadata={"help": "Peak learning rate of the last stage (the task loss)."}
    )
    local_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the earlier stages. By default a tenth of --learning_rate for "
            "reconstruction, half of it for next_token. The paper sets the two equal, which did harm to reconstruction "
            "on a small model: Adam makes full-sized steps for any loss, however small, so equal rates move the "
            "pretrained first half as far as the second, blind to the task."
        },
    )
    local_head_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of the earlier stages' heads and auxiliary networks; by default that of their "
            "blocks."
        },
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled weight decay of matrices (not of biases and norms)."}
    )
    optim: Literal["adamw_torch_fused", "adamw_torch"] = field(
        default="adamw_torch_fused",
        metadata={"help": "AdamW in one kernel per tensor list (fused), or in several; fused is the faster."},
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.999, metadata={"help": "AdamW's second beta."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    max_grad_norm: float = field(
        default=1.0,
        metadata={
            "help": "Clips the norm of each stage's own gradient; 0 is off. (A norm over all stages would make each "
            "wait for the others.)"
        },
    )
    lr_scheduler_type: SchedulerType = field(
        default=SchedulerType.LINEAR, metadata={"help": "Schedule of the learning rates, as in transformers."}
    )
    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of all steps spent on a linear warm-up from 0."})
    warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up; wins over --warmup_ratio."})

    def __post_init__(self) -> None:
        if isinstance(self.lr_scheduler_type, str):  # argparse leaves a string.
            try:
                object.__setattr__(self, "lr_scheduler_type", SchedulerType(self.lr_scheduler_type))
            except ValueError as error:
                given = shown(self.lr_scheduler_type)
                raise LoptError(f"--lr_scheduler_type {given}: {error}") from error
        check_types(self)
        if self.lr_scheduler_type.value in _FOLLOW_A_METRIC:
            raise LoptError(
                f"--lr_scheduler_type {self.lr_scheduler_type.value} follows an evaluation, of which only the last "
                f"stage would know; take another"
            )
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise LoptError(f"--{name} {getattr(self, name)}: at least 0")
        for name in ("local_learning_rate", "local_head_learning_rate"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise LoptError(f"--{name} {getattr(self, name)}: at least 0")
        for name in ("adam_beta1", "adam_beta2", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise LoptError(f"--{name} {getattr(self, name)}: at least 0 and below 1")

    def rates_of_earlier_stage(self, share: float) -> tuple[float, float]:
        """The peak learning rates of an earlier stage's block and of its head.

        Args:
            share: of --learning_rate that the block has by default.
        """
        given = self.local_learning_rate
        block = share * self.learning_rate if given is None else given
        head = self.local_head_learning_rate
        return block, block if head is None else head


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
            self.schedule = get_scheduler(config.lr_scheduler_type, self.adamw, warmup, num_steps)
        except (TypeError, ValueError) as error:
            kind = config.lr_scheduler_type.value
            raise LoptError(
                f"--lr_scheduler_type {kind} needs settings that have no flag ({error}); take another"
            ) from error

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
        # The schedules of transformers are functions of the step, so their place is all their state.
        place = {"last_epoch": steps_done, "_step_count": steps_done + 1}
        self.schedule.load_state_dict(self.schedule.state_dict() | place)
        rates = self.schedule.get_lr()
        for group, rate in zip(self.adamw.param_groups, rates, strict=True):
            group["lr"] = rate
        self.schedule.load_state_dict(self.schedule.state_dict() | {"_last_lr": rates})

    def step(self) -> None:
        """Applies the gradient, drops it, and moves the schedule on."""
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.schedule.step()

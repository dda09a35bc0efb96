"""Learning rates, the optimizer and the schedule."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from transformers import SchedulerType

from lopt_pp.config.fields import check_types
from lopt_pp.errors import LoptError, shown

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

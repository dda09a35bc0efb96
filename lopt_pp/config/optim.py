"""Learning rates, the optimizer and the schedule."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, get_args

from lopt_pp.config.fields import Resume, check_types, flag
from lopt_pp.config.optimizer_names import (
    Optim,
    OptimizerKind,
    mapping_of,
    mapping_text,
    optimizer_kind,
    parse_optim_args,
)
from lopt_pp.errors import LoptError, shown

Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
"""The values of transformers' `SchedulerType`, in its order, without an import of transformers."""

FOLLOW_A_METRIC: tuple[Schedule, ...] = ("reduce_lr_on_plateau", "greedy")
"""The schedules among them that are refused."""


@dataclass(frozen=True)
class OptimConfig:
    """Learning rates, the optimizer and the schedule; every stage has its own."""

    _argument_group_name: ClassVar[str] = "Optimizer"

    learning_rate: float = field(
        default=2e-5,
        metadata=flag(
            "Peak learning rate of the last stage (the task loss).",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    local_learning_rate: float | None = field(
        default=None,
        metadata=flag(
            "Peak learning rate of the earlier stages. By default a tenth of --learning_rate for "
            "reconstruction, half of it for next_token. The paper sets the two equal, which did harm to reconstruction "
            "on a small model: Adam makes full-sized steps for any loss, however small, so equal rates move the "
            "pretrained first half as far as the second, blind to the task.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    local_head_learning_rate: float | None = field(
        default=None,
        metadata=flag(
            "Peak learning rate of the earlier stages' heads and auxiliary networks; by default that of their blocks.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    weight_decay: float = field(
        default=0.0,
        metadata=flag(
            "Decoupled weight decay of matrices (not of biases and norms).",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    optim: Optim = field(
        default="adamw_torch_fused",
        metadata=flag(
            "The optimizer, by transformers' names. AdamW in one kernel per tensor list (adamw_torch_fused), or in "
            "several; fused is the faster. Names with 8bit or 32bit, lion and ademamix need bitsandbytes, "
            "schedule_free needs schedulefree. muon is of PyTorch: for the matrices of the layers, at AdamW's rates, "
            "and AdamW for all else.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    optim_args: str | None = field(
        default=None,
        metadata=flag(
            "Further settings of the optimizer, such as momentum=0.9,nesterov=true of sgd.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    optimizer_offload: bool = field(
        default=False,
        metadata=flag(
            "Keep the optimizer's state in main memory, and bring it to the GPU for its step, some layers at a time: "
            "the same bits, and 8 bytes less of the GPU's memory for each weight.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    adam_beta1: float = field(
        default=0.9,
        metadata=flag(
            "AdamW's first beta.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    adam_beta2: float = field(
        default=0.999,
        metadata=flag(
            "AdamW's second beta.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    adam_epsilon: float = field(
        default=1e-8,
        metadata=flag(
            "AdamW's epsilon.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=flag(
            "Clips the norm of each stage's own gradient; 0 is off. (A norm over all stages would make each "
            "wait for the others.)",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    lr_scheduler_type: Schedule = field(
        default="linear",
        metadata=flag(
            "Schedule of the learning rates, as in transformers.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    lr_scheduler_kwargs: str | None = field(
        default=None,
        metadata=flag(
            "Settings of the schedule, as JSON (a mapping in YAML): '{\"min_lr_rate\": 0.1}' of cosine_with_min_lr. "
            "Rates among them are of --learning_rate: stages that learn at another rate keep the same share of it.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    warmup_ratio: float = field(
        default=0.0,
        metadata=flag(
            "Share of all steps spent on a linear warm-up from 0.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    warmup_steps: int = field(
        default=0,
        metadata=flag(
            "Steps of linear warm-up; wins over --warmup_ratio.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        if isinstance(self.lr_scheduler_type, Enum):  # transformers' own, from Python.
            object.__setattr__(self, "lr_scheduler_type", self.lr_scheduler_type.value)
        kind, known = self.lr_scheduler_type, list(get_args(Schedule))
        if not isinstance(kind, str):
            raise LoptError(f"--lr_scheduler_type {shown(kind)}: of the wrong type; expected SchedulerType")
        if kind not in known:
            raise LoptError(
                f"--lr_scheduler_type {shown(kind)}: {kind} is not a valid SchedulerType, please select one of {known}"
            )
        settings = mapping_text("lr_scheduler_kwargs", self.lr_scheduler_kwargs)
        object.__setattr__(self, "lr_scheduler_kwargs", settings)
        check_types(self)
        parse_optim_args(self.optim_args)
        if self.optimizer_offload and not self.kind.offloads:
            raise LoptError(
                f"--optimizer_offload with --optim {self.optim}: a paged optimizer moves its state by itself, and a "
                f"schedule-free one steps over all weights at once; leave it out, or take --optim adamw_torch_fused"
            )
        if kind in FOLLOW_A_METRIC:
            raise LoptError(
                f"--lr_scheduler_type {kind} follows an evaluation, of which only the last stage would know; take "
                f"another"
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

    @property
    def kind(self) -> OptimizerKind:
        """What is known of the optimizer."""
        return optimizer_kind(self.optim)

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """`--optim_args`, by name."""
        return parse_optim_args(self.optim_args)

    def schedule_settings(self, learning_rate: float) -> dict[str, Any]:
        """`--lr_scheduler_kwargs`, by name, for a stage that learns at this peak rate."""
        settings = mapping_of(self.lr_scheduler_kwargs)
        if self.learning_rate and isinstance(settings.get("min_lr"), int | float) and "min_lr_rate" not in settings:
            settings["min_lr_rate"] = settings.pop("min_lr") / self.learning_rate
        if self.learning_rate and isinstance(settings.get("lr_end"), int | float):
            settings["lr_end"] *= learning_rate / self.learning_rate
        return settings

    def rates_of_earlier_stage(self, share: float) -> tuple[float, float]:
        """The peak learning rates of an earlier stage's block and of its head.

        Args:
            share: of --learning_rate that the block has by default.
        """
        given = self.local_learning_rate
        block = share * self.learning_rate if given is None else given
        head = self.local_head_learning_rate
        return block, block if head is None else head

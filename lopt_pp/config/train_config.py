"""The flags of a training run: one config for each group of flags, and all of them together."""

import dataclasses
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lopt_pp.config.checkpoint import CheckpointConfig
from lopt_pp.config.compute import StageConfig
from lopt_pp.config.data import DataConfig
from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.config.fields import Effects, Resume, check_types, effects_of, expand_home, flag
from lopt_pp.config.hub import HubConfig
from lopt_pp.config.model import ModelConfig
from lopt_pp.config.monitoring import ReportConfig
from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.topology import Topology
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class RunConfig:
    """How long to train, on how much at once, and where the result goes."""

    _argument_group_name: ClassVar[str] = "Run"

    output_dir: str = field(
        metadata=flag(
            "Directory for the trained model, its tokenizer, a model card and metrics.jsonl. Required.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
            is_path=True,
        )
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata=flag(
            "Let the new model replace one that --output_dir already holds.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    max_steps: int = field(
        default=-1,
        metadata=flag(
            "Number of optimizer steps; if above 0 it wins over --num_train_epochs.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    num_train_epochs: float = field(
        default=3.0,
        metadata=flag(
            "Number of passes over the data.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    per_device_train_batch_size: int = field(
        default=8,
        metadata=flag(
            "Rows of a microbatch.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata=flag(
            "Microbatches of an optimizer step. Every loss is the mean over all counted tokens of the step, "
            "not a mean of the microbatches' means.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    seed: int = field(
        default=42,
        metadata=flag(
            "Seed of the data order, the heads' initial weights and dropout.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    data_seed: int | None = field(
        default=None,
        metadata=flag(
            "Seed of the data order; by default --seed.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    dataloader_drop_last: bool = field(
        default=False,
        metadata=flag(
            "Leave out the rows at the end of an epoch that fill no microbatch of all replicas. Otherwise they make a "
            "smaller one. The order is drawn anew in each epoch, so that these are others.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    logging_strategy: Literal["no", "steps", "epoch"] = field(
        default="steps",
        metadata=flag(
            "When there are log lines, and trackers are given something: every --logging_steps, after each epoch, or "
            "not at all (metrics.jsonl has every step). But for no, the last step has one.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    logging_steps: int = field(
        default=10,
        metadata=flag(
            "Steps between log lines, and between what trackers are given (metrics.jsonl has every step).",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=True,
        ),
    )
    logging_first_step: bool = field(
        default=False,
        metadata=flag(
            "A log line of the first step as well.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise LoptError(f"--{name} {getattr(self, name)}: at least 1")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise LoptError("--max_steps or --num_train_epochs must be above 0")
        for name in ("seed", "data_seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise LoptError(f"--{name} {value}: at least 0")

    def num_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)

    def logs_every(self, steps_per_epoch: int) -> int:
        """Steps between logs; 0 for none."""
        return {"no": 0, "steps": self.logging_steps, "epoch": steps_per_epoch}[self.logging_strategy]


@dataclass(frozen=True)
class Config:
    """Everything a run is told, by component."""

    model: ModelConfig
    data: DataConfig
    pipeline: PipelineConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    stage: StageConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    report: ReportConfig
    hub: HubConfig
    run: RunConfig

    def __post_init__(self) -> None:
        self.objective.check_accumulation(self.run.gradient_accumulation_steps)
        self.evaluation.check_checkpoints(self.checkpoint)
        if self.pipeline.sharding == "full" and (reason := self.optim.kind.unsharded):
            raise LoptError(
                f"--optim {self.optim.optim} cannot be shared out among replicas (--sharding full): {reason}; take "
                f"--optim adamw_torch_fused, or --sharding none"
            )
        if self.objective.router_aux_loss_coef and self.stage.compiles:
            raise LoptError("--router_aux_loss_coef with --torch_compile: compiled layers hide routers; leave one out")
        if self.objective.max_interface_drift is not None and self.report.probe_steps == 0:
            raise LoptError("--max_interface_drift needs a drift that is measured: --probe_steps above 0")

    @property
    def chooses(self) -> bool:
        """Whether what is left of a run depends on what evaluations measure."""
        return self.evaluation.chooses or self.checkpoint.only_best

    def saves_after(self, step: int, steps_per_epoch: int) -> bool:
        """Whether the stages are saved when `step` steps are done; the checkpoint may be dropped again (`best`)."""
        if self.checkpoint.only_best:
            return self.evaluation.is_due(step, steps_per_epoch)
        return self.checkpoint.saves_after(step, steps_per_epoch)

    def topology(self, world_size: int) -> Topology:
        """Lays the run over the processes that there are.

        Raises:
            LoptError: they do not fit.
        """
        is_end_to_end = self.objective.method == "e2e"
        topology = self.pipeline.topology(world_size, is_end_to_end)
        if is_end_to_end and topology.num_processes > 1 and self.pipeline.sharding == "full":
            raise LoptError(
                "--sharding full with --method e2e needs the whole model in each replica: --pipeline_processes 1"
            )
        cuts = self.pipeline.boundaries
        if cuts is not None and 1 < topology.num_stages != len(cuts) + 1:
            raise LoptError(
                f"--method e2e has one block in each of {topology.num_stages} processes, but --split "
                f"{self.pipeline.split} makes {len(cuts) + 1}"
            )
        return topology

    def flags(self, which: Callable[[Effects], bool] = lambda effects: True) -> dict[str, Any]:
        """Flags with their values, as plain data for files; without those that are secret.

        Args:
            which: chooses them by what they affect; by default all.
        """
        components = vars(self).values()
        flags = {name: value for component in components for name, value in dataclasses.asdict(component).items()}
        return {name: value for name, value in flags.items() if which(EFFECTS[name]) and name not in SECRETS}


COMPONENTS: tuple[type, ...] = tuple(typing.get_type_hints(Config).values())
"""The config dataclasses that a `Config` is made of, in order."""

EFFECTS: dict[str, Effects] = {
    name: effects for component in COMPONENTS for name, effects in effects_of(component).items()
}
"""What each flag of a run affects, by the flag's name."""


def _marked(mark: str) -> frozenset[str]:
    fields = (field for component in COMPONENTS for field in dataclasses.fields(component))
    return frozenset(field.name for field in fields if field.metadata.get(mark))


SECRETS = _marked("is_secret")
"""The flags whose values are written nowhere."""

PATHS = _marked("is_path")
"""The flags whose values are paths of this machine, or may be."""

DEFAULTS: dict[str, Any] = {
    field.name: field.default for component in COMPONENTS for field in dataclasses.fields(component)
}
"""The value of each flag of a run that is not given, by the flag's name."""

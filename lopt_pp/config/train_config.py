"""The flags of a training run: one config for each group of flags, and all of them together."""

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from lopt_pp.config.checkpoint import CheckpointConfig
from lopt_pp.config.compute import StageConfig
from lopt_pp.config.data import DataConfig
from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.config.fields import check_types
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
        metadata={"help": "Directory for the trained model, its tokenizer, a model card and metrics.jsonl. Required."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Let the new model replace one that --output_dir already holds."}
    )
    max_steps: int = field(
        default=-1, metadata={"help": "Number of optimizer steps; if above 0 it wins over --num_train_epochs."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Number of passes over the data."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a microbatch."})
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Microbatches of an optimizer step. Every loss is the mean over all counted tokens of the step, "
            "not a mean of the microbatches' means."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of the data order, the heads' initial weights and dropout."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between log lines (metrics.jsonl has every step)."})

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise LoptError(f"--{name} {getattr(self, name)}: at least 1")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise LoptError("--max_steps or --num_train_epochs must be above 0")
        if self.seed < 0:
            raise LoptError(f"--seed {self.seed}: at least 0")


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
    run: RunConfig

    def __post_init__(self) -> None:
        self.objective.check_accumulation(self.run.gradient_accumulation_steps)
        self.evaluation.check_checkpoints(self.checkpoint.save_steps)
        if self.objective.max_interface_drift is not None and self.report.probe_steps == 0:
            raise LoptError("--max_interface_drift needs a drift that is measured: --probe_steps above 0")

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

    def settings(self) -> dict[str, Any]:
        """The flags that change what a run learns and may change on its way, with their values."""
        objective = dataclasses.asdict(self.objective)
        names = ["reconstruction_weight", "local_head_warmup_steps", "local_accumulation_steps"]
        names += ["max_interface_drift", "train_embeddings"]
        chosen = {name: objective[name] for name in names} | {"dtype": self.stage.dtype}
        chosen |= dataclasses.asdict(self.optim)
        return {f"--{name}": value.value if isinstance(value, Enum) else value for name, value in chosen.items()}

    def flags(self) -> dict[str, Any]:
        """Every flag with its value, as plain data for files."""
        flags = {}
        for component in vars(self).values():
            for name, value in dataclasses.asdict(component).items():
                flags[name] = value.value if isinstance(value, Enum) else value
        return flags

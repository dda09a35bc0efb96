"""The flags of a training run: the components' own configs, composed, parsed and checked once."""

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import yaml
from trl import TrlParser

from lopt_pp.checkpoint import CheckpointConfig
from lopt_pp.computation import StageConfig
from lopt_pp.data import DataConfig
from lopt_pp.errors import LoptError, first_line, shown
from lopt_pp.evaluation import EvaluationConfig
from lopt_pp.flags import check_types
from lopt_pp.insight.config import ReportConfig
from lopt_pp.model import ModelConfig
from lopt_pp.objectives import ObjectiveConfig, local_objective_class
from lopt_pp.optim import OptimConfig
from lopt_pp.topology import PipelineConfig, Topology

_DESCRIPTION = """\
Post-trains a causal language model by local learning (LoPT), as a pipeline of stages: each process holds a block of the
model's layers, sends detached hidden states forward, and runs its own backward. Start it with torchrun, one process per
stage:

  torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train \\
      --model_name_or_path MODEL --train_file data.jsonl --output_dir out

Any flag may also stand in a YAML file given by --config FILE, under its own name without the dashes; flags on the
command line win over the file.
"""


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
        local_objective_class(self.objective)  # Whether there is such a one.
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


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag once, under the name that the docs use."""

    def add_argument(self, action: argparse.Action) -> None:
        # `--no_NAME` says nothing that `--NAME false` does not.
        if not isinstance(action, argparse._StoreFalseAction):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        kind = getattr(action.type, "__name__", "value").upper()
        value = "|".join(map(str, action.choices)) if action.choices else "BOOL" if kind == "STRING_TO_BOOL" else kind
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, Enum):
            return f"{action.help} (default: {action.default.value})"
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(TrlParser):
    """TRL's parser, whose complaints are raised instead of printed below a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise LoptError(message.removeprefix("argument "))


def parse_config(arguments: Sequence[str], prog: str = "lopt-pp train") -> Config:
    """Reads the flags of a run, and the YAML file that `--config` names, whose `env` goes into the environment.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    components: list[Any] = [component.type for component in dataclasses.fields(Config)]
    usage = "torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train [--config FILE] FLAGS"
    return Config(*parse_components(components, arguments, prog, usage, _DESCRIPTION))


def parse_components(
    components: Iterable[Any], arguments: Sequence[str], prog: str, usage: str, description: str
) -> list[Any]:
    """Reads flags, and the YAML file that `--config` names, into one config of each of the components.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    parser = _Parser(
        components,
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    arguments, path = _take_config_path(arguments)
    known = {action.dest for action in parser._actions} - {"help"}
    environment: dict[Any, Any] = {}
    if path is not None:
        settings = _read_file(path)
        environment = settings.pop("env", {})
        for name in settings:
            if name not in known:
                raise LoptError(f"{path}: unknown flag {name}{_suggest(name, known)}")
        parser.set_defaults_with_config(**settings)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise LoptError(f"unknown flag {unknown[0]}{_suggest(unknown[0].lstrip('-').split('=')[0], known)}")
    try:
        for name, value in environment.items():
            os.environ[name] = str(value)
    except (OSError, TypeError, ValueError) as error:
        raise LoptError(f"--config {path}: env: {shown(name)}: {shown(value)}: {first_line(error)}") from error
    return parsed


def _take_config_path(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--config FILE`, and the file."""
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if "--config" not in arguments:
        return arguments, None
    position = arguments.index("--config")
    if position + 1 == len(arguments) or "--config" in arguments[position + 1 :]:
        raise LoptError("--config: give the path of a YAML file, once")
    return arguments[:position] + arguments[position + 2 :], Path(arguments[position + 1])


def _read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with plain values below `env`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LoptError(f"--config {path}: {error}") from error
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # Besides YAMLError, whatever a malformed tag makes of a value: there is no list of it.
        raise LoptError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise LoptError(f"--config {path}: expected lines of the form 'flag: value'")
    environment = content.get("env", {})
    if not isinstance(environment, dict) or any(isinstance(value, list | dict) for value in environment.values()):
        raise LoptError(f"--config {path}: env: expected lines of the form 'NAME: value' below it")
    return content


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean --{close[0]}?" if close else "; see --help"

"""A run's flags as the `transformers.TrainingArguments` that callbacks are given."""

import dataclasses
import os
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from transformers import TrainingArguments

from lopt_pp.config.train_config import Config


class RunArguments(TrainingArguments):
    """Training arguments that tell of a run, and change nothing in this process: no device, no state of accelerate.

    Attributes that are flags here have their values; the rest are transformers' defaults. `to_dict`, which is what
    trackers show, has all flags of the run and nothing else.
    """

    flags: Mapping[str, Any]
    """All of the run's, by name."""

    num_processes: int = 1

    @property
    def device(self) -> torch.device:
        """The CPU: which stage is on which device is in `run.json`."""
        return torch.device("cpu")

    @property
    def n_gpu(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        """Processes of the run."""
        return self.num_processes

    @property
    def process_index(self) -> int:
        """Rank 0, which calls all callbacks."""
        return 0

    @property
    def local_process_index(self) -> int:
        return 0

    def to_dict(self) -> dict[str, Any]:
        """All flags of the run; a token of the hub is not shown."""
        return {name: "<HUB_TOKEN>" if name == "hub_token" and value else value for name, value in self.flags.items()}


def as_training_arguments(
    config: Config, num_steps: int, *, evaluates: bool, num_processes: int = 1, reports_to: tuple[str, ...] = ()
) -> RunArguments:
    """A run's flags as training arguments.

    Args:
        config: the flags.
        num_steps: of the run.
        evaluates: whether it has held-out rows.
        num_processes: of the run.
        reports_to: names of its trackers.
    """
    flags = config.flags()
    strategy = config.evaluation.eval_strategy if evaluates else "no"
    saving = config.checkpoint.save_strategy if config.checkpoint.saves else "no"
    name = config.report.run_name or os.path.basename(os.path.abspath(config.run.output_dir))
    arguments = RunArguments(output_dir=config.run.output_dir, run_name=name, eval_strategy=strategy, eval_steps=1)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for flag, value in flags.items():
        if value is not None and flag in known and flag not in ("output_dir", "report_to", "run_name"):
            setattr(arguments, flag, _like(getattr(arguments, flag), value))
    # 0 is off here, or the last step alone; what counts in steps is not to divide by it.
    arguments.eval_steps = config.evaluation.eval_steps or num_steps
    arguments.eval_strategy = _like(arguments.eval_strategy, strategy)
    arguments.save_strategy = _like(arguments.save_strategy, saving)
    arguments.save_steps = config.checkpoint.save_steps or num_steps
    arguments.report_to = list(reports_to)
    arguments.bf16 = config.stage.dtype != "float32"
    arguments.do_train = True
    if arguments.metric_for_best_model is None and evaluates:
        arguments.metric_for_best_model = "loss"
    if arguments.greater_is_better is None and evaluates:
        arguments.greater_is_better = not str(arguments.metric_for_best_model).endswith(("loss", "perplexity"))
    arguments.flags, arguments.num_processes = flags, num_processes
    return arguments


def _like(default: Any, value: Any) -> Any:
    """A flag's value as a member of the enumeration that transformers has for it, where there is such a member."""
    if isinstance(default, Enum):
        kind = type(default)
        return kind(value) if value in [member.value for member in kind] else value
    return value

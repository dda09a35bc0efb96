"""What a run is: what its processes, and a run that goes on from its checkpoint, must have in common with it."""

import torch
import transformers
from transformers import PreTrainedConfig

from lopt_pp.config.objective import EVEN
from lopt_pp.config.train_config import Config
from lopt_pp.data import Rows, TokenizedRows

_MAY_DIFFER = (
    "model_name_or_path",
    "train_file",
    "eval_file",
    "dataset_num_proc",
    "output_dir",
    "overwrite_output_dir",
    "logging_steps",
    "report_to",
    "logging_dir",
    "run_name",
)
"""Between processes: paths of machines, of which what they hold is compared, and what changes no result."""


def shared_by_ranks(
    config: Config, model_config: PreTrainedConfig, rows: Rows, held_out: TokenizedRows | None
) -> dict[str, object]:
    """What all processes must have in common for the result to mean anything, by name."""
    flags = {f"--{name}": value for name, value in config.flags().items() if name not in _MAY_DIFFER}
    return {
        **flags,
        **_inputs(model_config, rows),
        **_held_out(held_out),
        "the version of torch": torch.__version__,
        "the version of transformers": transformers.__version__,
    }


def must_match(config: Config, model_config: PreTrainedConfig, rows: Rows, num_replicas: int) -> dict[str, object]:
    """What a run must have in common with the one whose checkpoint it goes on from, by name."""
    run, objective = config.run, config.objective
    groups = config.data.train_sampling_strategy == "group_by_length"
    local: dict[str, object] = {"--local_objective": objective.local}
    if objective.local == "next_token":
        if objective.auxiliary_choice == EVEN:
            local["--auxiliary_layers"] = objective.auxiliary_layers
        local["--auxiliary_choice"] = objective.auxiliary_choice
    return {
        "--eval_split_size": config.evaluation.eval_split_size,
        **_inputs(model_config, rows),
        "the rows of a step": run.per_device_train_batch_size * run.gradient_accumulation_steps * num_replicas,
        "the rows that are grouped by length": run.per_device_train_batch_size if groups else 0,
        **config.data.essentials(),
        "--seed": run.seed,
        # `frozen` is another name of a local objective.
        "--method": "e2e" if objective.method == "e2e" else "lopt",
        **local,
        "the dtype of the weights": str(config.stage.parameter_dtype),
    }


def may_change(config: Config, num_steps: int, held_out: TokenizedRows | None) -> dict[str, object]:
    """What changes the result of a run, and may change on the way, by name."""
    return {"the number of steps": num_steps, **config.settings(), **_held_out(held_out)}


def _held_out(rows: TokenizedRows | None) -> dict[str, object]:
    return {EVALUATION_ROWS: rows.digest} if rows is not None else {}


def _inputs(model_config: PreTrainedConfig, rows: Rows) -> dict[str, object]:
    return {
        "the training rows (sha256)": rows.digest,
        "the model's config": model_config.to_json_string(use_diff=False),
    }


EVALUATION_ROWS = "the evaluation rows (sha256)"
"""In a manifest's `run`: losses compare only on the same rows."""

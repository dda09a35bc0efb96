"""What the ranks of a run must have in common with each other, and a run with the one whose checkpoint it goes on from.

Most of it are flags, which say in `lopt_pp.config` what they affect. What is derived from flags, or comes from
elsewhere, is here. All of it has identifiers for names: they are in manifests, and stay when words for them change.
"""

import json
from collections.abc import Mapping

import torch
import transformers
from transformers import PreTrainedConfig

from lopt_pp.checkpoint.manifest import TRAIN_ROWS
from lopt_pp.config.data import DataConfig
from lopt_pp.config.fields import Resume
from lopt_pp.config.objective import EVEN, ObjectiveConfig
from lopt_pp.config.optimizer_names import ADAMW_STATE
from lopt_pp.config.train_config import DEFAULTS, Config
from lopt_pp.data import Rows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.data.streaming import StreamedRows
from lopt_pp.errors import shown

EVALUATION_ROWS = "evaluation_rows_sha256"
"""In a manifest's `run`: losses compare only on the same rows."""

EMBEDDINGS_TIED = "embeddings_tied"
"""In a manifest's `run`, of models whose config ties them."""

OPTIMIZER_STATE = "optimizer_state"
"""In a manifest's `run`: what state the optimizer keeps."""

LEFT_OUT: dict[str, object] = {
    **DEFAULTS,
    EMBEDDINGS_TIED: False,
    OPTIMIZER_STATE: ADAMW_STATE,
    "packing_strategy": "bfd",
}
"""What it means that a manifest does not have a name: it is older than the name. A flag was at its default."""

TRAIN_FILES = "train_files_sha256"
"""In a manifest's `run`, of streamed rows: the content of their files. That an older one lacks it says nothing."""

_WORDS = {
    TRAIN_ROWS: "the training rows (sha256)",
    TRAIN_FILES: "the content of the training files (sha256)",
    EVALUATION_ROWS: "the evaluation rows (sha256)",
    "model_config": "the model's config",
    "rows_per_step": "the rows of a step",
    "rows_grouped_by_length": "the rows that are grouped by length",
    "parameter_dtype": "the dtype of the weights",
    OPTIMIZER_STATE: "the state that the optimizer (--optim) keeps",
    EMBEDDINGS_TIED: "whether the input and output embeddings are tied",
    "num_steps": "the number of steps",
    "torch_version": "the version of torch",
    "transformers_version": "the version of transformers",
}


def in_words(name: str) -> str:
    """What a message calls something that these functions name: a flag, or what is derived."""
    return _WORDS.get(name, f"--{name}")


def difference(name: str, now: object, before: object) -> str:
    """What a run has otherwise than the one that wrote a checkpoint, in words; empty where it is the same.

    Args:
        name: of these functions.
        now: what the run has; plain data, as JSON gives it back.
        before: what the checkpoint has; None where its version did not know of it.
    """
    if name == "model_config" and isinstance(now, str) and isinstance(before, str):
        now, before = _differing(_model_config(now), _model_config(before))
    return "" if now == before else f"{in_words(name)} is {shown(now)}, and was {shown(before)}"


def length_matters(run: Mapping[str, object]) -> bool:
    """Whether the learning rate of a step depends on the number of steps.

    Args:
        run: of `may_change`.
    """
    schedule = run["lr_scheduler_type"]
    if schedule in ("constant_with_warmup", "inverse_sqrt"):
        return not run["warmup_steps"] and bool(run["warmup_ratio"])
    return schedule != "constant"


def _model_config(text: str) -> object:
    """A model's config, as JSON, without where it was read."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _without(content, "_name_or_path")


def _without(content: object, key: str) -> object:
    """Plain data without a key, at any depth: configs may have others in them."""
    if isinstance(content, list):
        return [_without(item, key) for item in content]
    if isinstance(content, dict):
        return {name: _without(value, key) for name, value in content.items() if name != key}
    return content


def _differing(now: object, before: object) -> tuple[object, object]:
    """Of two configs what they have otherwise. Keys that one version of transformers lacks are not compared."""
    if not isinstance(now, dict) or not isinstance(before, dict):
        return now, before
    versions = now.pop("transformers_version", None), before.pop("transformers_version", None)
    keys = now.keys() & before.keys() if versions[0] != versions[1] else now.keys() | before.keys()
    differ = [key for key in sorted(keys) if now.get(key) != before.get(key)]
    return {key: now.get(key) for key in differ}, {key: before.get(key) for key in differ}


def shared_by_ranks(
    config: Config, model_config: PreTrainedConfig, rows: Rows, held_out: EvaluationSets | None
) -> dict[str, object]:
    """What all ranks must have in common for the result to mean anything, by name."""
    return {
        **config.flags(lambda effects: effects.shared_by_ranks),
        **_inputs(model_config, rows),
        **_evaluation_rows(held_out),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


def must_match(
    config: Config, model_config: PreTrainedConfig, rows: Rows, num_replicas: int, ties_embeddings: bool = False
) -> dict[str, object]:
    """What a run must have in common with the one whose checkpoint it goes on from, by name.

    The first difference is what the user reads, so a flag that changes the training rows comes before them.
    """
    run = config.run
    groups = config.data.train_sampling_strategy == "group_by_length"
    flags = config.flags(lambda effects: effects.on_resume is Resume.MUST_MATCH)
    return {
        "eval_split_size": flags.pop("eval_split_size"),
        "truncation_mode": flags.pop("truncation_mode"),
        **_inputs(model_config, rows),
        "rows_per_step": run.per_device_train_batch_size * run.gradient_accumulation_steps * num_replicas,
        "rows_grouped_by_length": run.per_device_train_batch_size if groups else 0,
        **flags,
        **_length_of_packs(config.data),
        **_method(config.objective),
        "parameter_dtype": str(config.stage.parameter_dtype),
        OPTIMIZER_STATE: config.optim.kind.state,
        **({EMBEDDINGS_TIED: ties_embeddings} if model_config.tie_word_embeddings else {}),
    }


def may_change(config: Config, num_steps: int, held_out: EvaluationSets | None) -> dict[str, object]:
    """What changes the result of a run, and may change when it goes on from a checkpoint, by name."""
    flags = config.flags(lambda effects: effects.on_resume is Resume.MAY_CHANGE)
    return {"num_steps": num_steps, **flags, **_evaluation_rows(held_out)}


def _inputs(model_config: PreTrainedConfig, rows: Rows) -> dict[str, object]:
    config = _model_config(model_config.to_json_string(use_diff=False))
    files = rows.files_digest if isinstance(rows, StreamedRows) else None
    return {
        TRAIN_ROWS: rows.digest,
        **({TRAIN_FILES: files} if files is not None else {}),
        "model_config": json.dumps(config, indent=2, sort_keys=True),
    }


def _evaluation_rows(sets: EvaluationSets | None) -> dict[str, object]:
    return {EVALUATION_ROWS: sets.digest} if sets is not None else {}


def _length_of_packs(data: DataConfig) -> dict[str, object]:
    """Without packing, it only leaves rows out, which the training rows tell."""
    return {"max_length": data.max_length} if data.packing else {}


def _method(objective: ObjectiveConfig) -> dict[str, object]:
    # `frozen` is another name of a local objective.
    method: dict[str, object] = {"method": "e2e" if objective.method == "e2e" else "lopt"}
    method["local_objective"] = objective.local
    if objective.local == "next_token":
        if objective.auxiliary_choice == EVEN:  # Otherwise the choice says how many they are.
            method["auxiliary_layers"] = objective.auxiliary_layers
        method["auxiliary_choice"] = objective.auxiliary_choice
    return method

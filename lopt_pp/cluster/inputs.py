"""What a run reads, looked at before it waits in a queue or loads libraries: file names and the model's config."""

import json
from pathlib import Path
from typing import Any

from lopt_pp.config.mixture import entry_name
from lopt_pp.config.train_config import Config
from lopt_pp.data.files import check_dataset_name, find_files
from lopt_pp.errors import LoptError, first_line, renamed_in_errors
from lopt_pp.model.location import PICKLED, check_location, has_weights, no_weights
from lopt_pp.model.partition import split_at, split_evenly

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What configs call the number of layers."""


def check_inputs(config: Config, num_processes: int | None = None) -> None:
    """Sees that there are the model and the rows that a run names, and that the model has layers for all stages.

    What is on a hub is not asked for, and no row is read: the run itself does so.

    Args:
        config: of the run.
        num_processes: of the run, where they are known.

    Raises:
        LoptError: the run would be refused at its start, with the reason.
    """
    _check_rows(config)
    path = Path(config.model.model_name_or_path)
    try:
        check_location(str(path))
    except LoptError as error:
        raise LoptError(f"--model_name_or_path {error}") from error
    if path.is_dir():
        content = _read_config(path)
        depth = _depth(content)
        if content.get("is_encoder_decoder") is True:
            raise LoptError(
                f"--model_name_or_path {path} is an encoder-decoder model ({content.get('model_type')}); give a causal "
                f"language model"
            )
        if not has_weights(str(path)):
            pickled = next((name for name in PICKLED if (path / name).exists()), None)
            raise LoptError(f"--model_name_or_path {no_weights(str(path), pickled)}")
        if depth is not None:
            _check_stages(config, num_processes, depth)


def _check_rows(config: Config) -> None:
    data, evaluation = config.data, config.evaluation
    if data.train_file:
        list(find_files(data.train_file))
    if data.dataset_name is not None:
        check_dataset_name(data.dataset_name)
    for number, entry in enumerate(data.mixture, start=1):
        with renamed_in_errors("--train_file", entry_name(number, {"path": entry.path})):
            list(find_files(entry.local_files or ()))
    if evaluation.eval_file is not None:
        with renamed_in_errors("--train_file", "--eval_file"):
            list(find_files([*evaluation.eval_files.values()]))
    if evaluation.dataset_test_split is not None and data.dataset_name is None:
        raise LoptError(f"--dataset_test_split {evaluation.dataset_test_split} is a split of --dataset_name; give that")
    template = data.chat_template_path
    if template is not None and Path(template).suffix == ".jinja" and not Path(template).is_file():
        raise LoptError(f"--chat_template_path {template} does not exist")


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoptError(f"--model_name_or_path {path} has no config.json; give the directory of a model") from None
    except (OSError, ValueError) as error:
        raise LoptError(f"--model_name_or_path: {file} cannot be read: {first_line(error)}") from error
    return content if isinstance(content, dict) else {}


def _depth(content: dict[str, Any]) -> int | None:
    """The number of layers, where the config has it under a name that is known."""
    return next((content[name] for name in _DEPTHS if type(content.get(name)) is int), None)


def _check_stages(config: Config, num_processes: int | None, depth: int) -> None:
    """Cuts the model as the run will."""
    if num_processes is None and config.objective.method == "e2e":
        return  # It has a stage in each process.
    num_stages = config.pipeline.num_stages if num_processes is None else config.topology(num_processes).num_stages
    cuts = config.pipeline.boundaries
    if cuts is not None and num_stages > 1:
        split_at(cuts, depth)
    else:
        split_evenly(depth, num_stages)

"""Sees that a name given to a command leads to a model or a checkpoint, before PyTorch is loaded."""

from importlib.util import find_spec
from pathlib import Path

from lopt_pp.checkpoint.output_dir import complete_checkpoints, is_checkpoint
from lopt_pp.errors import LoptError
from lopt_pp.model.location import check_location
from lopt_pp.model.on_hub import check_on_hub


def check_model_or_checkpoint(name: str) -> None:
    """Sees that there is what a name says.

    Args:
        name: directory or hub id of a model, or directory of a checkpoint.

    Raises:
        LoptError: there is not; the text says what there is instead.
    """
    check_location(name, allows_adapters=find_spec("peft") is not None)  # With it, transformers loads these.
    check_on_hub(name)
    directory = Path(name)
    if directory.is_dir() and not is_checkpoint(directory) and not (directory / "config.json").exists():
        newest = [f"; it has a checkpoint, {found}" for found in complete_checkpoints(directory)[:1]]
        raise LoptError(f"{name} has no model{''.join(newest)}")

"""What can be known of an output directory before a run waits in a queue: without its rows, its model and PyTorch."""

import json
import os
from pathlib import Path

from lopt_pp.checkpoint.output_dir import (
    MANIFEST_FILE,
    RUN_FILE,
    check_is_directory,
    check_no_model,
    check_output_dir,
    complete_checkpoints,
    is_checkpoint,
    model_origin,
)
from lopt_pp.config.fields import Resume
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError


def check_before_queue(config: Config, path: Path, num_replicas: int, writes: bool) -> None:
    """Sees that a run that goes on from the newest checkpoint of its output directory can use the directory.

    Args:
        config: of the run.
        path: of the output directory.
        num_replicas: of the pipeline.
        writes: whether the directory may be made and written to for a try.

    Raises:
        LoptError: it holds a model, or checkpoints of something else, or cannot be written.
    """
    there = complete_checkpoints(path)
    whole = [directory for directory in there if is_checkpoint(directory)]
    if there and not whole:
        raise LoptError(
            f"--output_dir {path} holds {there[0].name}, which has no {MANIFEST_FILE} and so is of another program, or "
            f"damaged; give another directory"
        )
    if whole:
        _check_same_run(
            config, num_replicas, max(whole, key=lambda directory: (directory / MANIFEST_FILE).stat().st_mtime)
        )
    extends = bool(whole) and _has_more_steps(config, path)
    if writes:
        check_output_dir(path, config.run.overwrite_output_dir, extends)
        return
    check_no_model(path, config.run.overwrite_output_dir, extends)
    check_is_directory(path)
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise LoptError(f"--output_dir {path} cannot be written: see {nearest}")


def _has_more_steps(config: Config, path: Path) -> bool:
    """Whether a finished run, whose model is there, is given more steps or epochs than it had."""
    origin, run = model_origin(path), config.run
    if origin is None or run.max_steps > 0:
        return origin is not None and run.max_steps > origin.num_steps
    try:
        flags = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))["flags"]
        return bool(flags["max_steps"] <= 0 and run.num_train_epochs > flags["num_train_epochs"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_same_run(config: Config, num_replicas: int, checkpoint: Path) -> None:
    """Compares what the flags alone say; the run compares all of it, and damage is the run's to see."""
    try:
        content = json.loads((checkpoint / MANIFEST_FILE).read_text(encoding="utf-8"))
        was, step = dict(content["run"]), int(content["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    run = config.run
    rows = run.per_device_train_batch_size * run.gradient_accumulation_steps * num_replicas
    flags = config.flags(lambda effects: effects.on_resume is Resume.MUST_MATCH)
    now = {"the rows of a step": ("rows_per_step", rows)} | {f"--{name}": (name, flags[name]) for name in flags}
    for words, (name, value) in now.items():
        if name in was and was[name] != value:
            raise LoptError(
                f"{checkpoint} is of another run: {words} is {value}, and was {was[name]}; give it as before, or "
                f"another --output_dir"
            )
    if 0 < run.max_steps < step:
        raise LoptError(f"{checkpoint} has done {step} steps, and the run has {run.max_steps}")

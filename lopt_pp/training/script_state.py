"""What a script may have set in its process that a run does not follow: the current directory, gradients turned off."""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from lopt_pp.checkpoint.output_dir import LATEST
from lopt_pp.config.data import IN_MEMORY
from lopt_pp.config.evaluation import named_file
from lopt_pp.config.mixture import with_paths
from lopt_pp.config.train_config import PATHS, Config

_MAYBE_OF_THE_HUB = {"model_name_or_path", "dataset_name", "chat_template_path"}
"""Flags whose values are paths only where there is something of that name."""


@contextmanager
def gradients_on() -> Iterator[None]:
    """Lets PyTorch make gradients, also for a script that has turned them off (`torch.no_grad`, `inference_mode`)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def current_directory() -> Path | None:
    """The current directory; None where it has been removed."""
    try:
        return Path.cwd()
    except OSError:
        return None


def anchored(config: Config, directory: Path | None) -> Config:
    """A config whose relative paths lead from a directory, whatever the current one is.

    Args:
        config: the flags.
        directory: the current one when they were given; None if that is not known. Where it still is the current one
            they stay as they are.
    """
    if directory is None or current_directory() == directory:
        return config

    def lead(path: str, is_sure: bool = True) -> str:
        is_place = path not in (IN_MEMORY, LATEST) and "://" not in path and not os.path.isabs(path)
        return (
            str(directory / path)
            if is_place and (is_sure or glob.has_magic(path) or (directory / path).exists())
            else path
        )

    def of_flag(name: str, value: Any) -> Any:
        if name == "datasets" and value is not None:
            return with_paths(value, lambda path: lead(path, is_sure=False))
        if name not in PATHS:
            return value
        if isinstance(value, list):
            return [_of_set(item, lead) if name == "eval_file" else lead(item) for item in value]
        return lead(value, name not in _MAYBE_OF_THE_HUB) if isinstance(value, str) else value

    groups = {}
    for group in fields(config):
        own = getattr(config, group.name)
        values = {field.name: getattr(own, field.name) for field in fields(own) if field.init}
        changed = {
            name: new for name, value in values.items() if (new := of_flag(name, value)) is not value and new != value
        }
        if changed:
            groups[group.name] = replace(own, **changed)
    return replace(config, **groups)


def _of_set(file: str, lead: Callable[[str], str]) -> str:
    name, path = named_file(file)
    return f"{name}={lead(path)}" if name else lead(path)

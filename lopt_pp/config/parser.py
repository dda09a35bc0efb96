"""The flags of a training run: the components' own configs, composed, parsed and checked once."""

import difflib
import os
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from lopt_pp.config.arguments import DataclassParser
from lopt_pp.config.train_config import COMPONENTS, Config
from lopt_pp.config.yaml_file import read_yaml
from lopt_pp.errors import LoptError, first_line, shown

_DESCRIPTION = """\
Post-trains a causal language model by local learning (LoPT), as a pipeline of stages: each process holds a block of the
model's layers, sends detached hidden states forward, and runs its own backward. Start it with torchrun, one process per
stage:

  torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train \\
      --model_name_or_path MODEL --train_file data.jsonl --output_dir out

Any flag may also be given in a YAML file given by --config FILE, under its own name without the dashes; flags on the
command line win over the file.
"""


def parse_config(arguments: Sequence[str], prog: str = "lopt-pp train") -> Config:
    """Reads the flags of a run, and the YAML file that `--config` names, whose `env` goes into the environment.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    usage = "torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train [--config FILE] FLAGS"
    return Config(*parse_components(COMPONENTS, arguments, prog, usage, _DESCRIPTION))


def parse_components(
    components: Sequence[type], arguments: Sequence[str], prog: str, usage: str, description: str
) -> list[Any]:
    """Reads flags, and the YAML file that `--config` names, into one config of each of the components.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    parser = DataclassParser(components, prog=prog, usage=usage, description=description)
    arguments, path = _take_config_path(arguments)
    known = parser.names
    environment: dict[str, str] = {}
    if path is not None:
        settings, environment = read_yaml(path)
        for name in settings:
            if name not in known:
                raise LoptError(f"{path}: unknown flag {name}{_suggest(name, known)}")
        parser.set_file(settings)
    configs, unknown, _ = parser.parse(arguments)
    if unknown:
        raise LoptError(f"unknown flag {unknown[0]}{_suggest(unknown[0].lstrip('-').split('=')[0], known)}")
    try:
        for name, value in environment.items():
            os.environ[name] = value
    except (OSError, TypeError, ValueError) as error:
        raise LoptError(f"--config {path}: env: {shown(name)}: {shown(value)}: {first_line(error)}") from error
    return configs


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
    return arguments[:position] + arguments[position + 2 :], Path(arguments[position + 1]).expanduser()


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean --{close[0]}?" if close else "; see --help"


def load_config(source: str | Path | Sequence[str] = (), **flags: object) -> Config:
    """Reads what a run is told.

    Args:
        source: path of a YAML file with flags, or a list of flags as on the command line.
        **flags: further ones by their names, such as `max_steps=100`; they win over the file.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
    """
    given = ["--config", str(source)] if isinstance(source, str | Path) else list(source)
    return parse_config([*given, *_as_arguments(flags)])


def _as_arguments(flags: dict[str, object]) -> Iterator[str]:
    for name, value in flags.items():
        if value is None:
            raise LoptError(f"--{name}: None is not a value of a flag; leave it out")
        if isinstance(value, list | tuple):
            yield from (f"--{name}", *map(str, value))
        elif isinstance(value, Enum):
            yield f"--{name}={value.value}"
        else:  # "True" and "False" are among the words that a flag takes for a boolean.
            yield f"--{name}={value}"

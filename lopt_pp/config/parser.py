"""The flags of a training run: the components' own configs, composed, parsed and checked once."""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from lopt_pp.config.arguments import DataclassParser
from lopt_pp.config.effects import check_effects
from lopt_pp.config.foreign import eval_strategy_of, translate_arguments, translate_file, without_effect
from lopt_pp.config.other_trainers import HINTS
from lopt_pp.config.train_config import COMPONENTS, EFFECTS, Config
from lopt_pp.config.yaml_file import read_yaml
from lopt_pp.errors import LoptError, first_line, shown

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Post-trains a causal language model by local learning (LoPT), as a pipeline of stages: each process holds a block of the
model's layers, sends detached hidden states forward, and runs its own backward. Start it with torchrun, one process per
stage:

  torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train \\
      --model_name_or_path MODEL --train_file data.jsonl --output_dir out

Any flag may also be given in a YAML file given by --config FILE, under its own name without the dashes; flags on the
command line win over the file.
"""


def parse_config(
    arguments: Sequence[str], prog: str = "lopt-pp train", warn: Callable[[str], object] = logger.warning
) -> Config:
    """Reads the flags of a run, and the YAML file that `--config` names, whose `env` goes into the environment.

    Args:
        arguments: the command line.
        prog: of the help.
        warn: is given a line for each flag that can have no effect, where that does no harm.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    usage = "torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train [--config FILE] FLAGS"
    configs, given = parse_components(COMPONENTS, arguments, prog, usage, _DESCRIPTION)
    config = Config(*configs)
    for warning in [*given.warnings, *check_effects(config, given.names, given.eval_strategy)]:
        warn(warning)
    return config


@dataclass(frozen=True)
class Given:
    """What is known of flags besides their values.

    Attributes:
        names: of our flags that are given, in the file or on the command line.
        eval_strategy: TRL's flag of that name, where it is given.
        warnings: lines for the user.
    """

    names: set[str]
    eval_strategy: str | None
    warnings: list[str]


def parse_components(
    components: Sequence[type], arguments: Sequence[str], prog: str, usage: str, description: str
) -> tuple[list[Any], Given]:
    """Reads flags, ours or TRL's, and the YAML file that `--config` names, into one config of each of the components.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    parser = DataclassParser(components, prog=prog, usage=usage, description=description)
    arguments, path = _take_config_path(arguments)
    known = parser.names
    environment: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    if path is not None:
        settings, environment = read_yaml(path)
        in_file = translate_file(path, settings)
        for name in in_file.flags:
            if name not in known:
                raise LoptError(f"{path}: unknown flag {name}{_suggest(name, known, prog)}")
        parser.set_file(in_file.flags)
        passed_over |= in_file.passed_over
    arguments, on_line = translate_arguments(arguments, parser.options)
    passed_over |= on_line.passed_over
    configs, unknown, names = parser.parse(arguments)
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise LoptError(f"unknown flag {unknown[0]}{_suggest(name, known, prog)}")
    try:
        for name, value in environment.items():
            os.environ[name] = value
    except (OSError, TypeError, ValueError) as error:
        raise LoptError(f"--config {path}: env: {shown(name)}: {shown(value)}: {first_line(error)}") from error
    warning = without_effect(passed_over)
    return configs, Given(names, eval_strategy_of(passed_over), [warning] if warning else [])


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


def _suggest(name: str, known: set[str], prog: str) -> str:
    if name in known:
        return f"; did you mean --{name}?"
    if name in HINTS:
        return f"; {HINTS[name]}"
    if name in EFFECTS:
        return f" of {prog}; it is one of lopt-pp train that changes nothing here: leave it out"
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

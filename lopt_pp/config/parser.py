"""The flags of a training run: the components' own configs, composed, parsed and checked once."""

import difflib
import json
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

from lopt_pp.config.arguments import DataclassParser
from lopt_pp.config.effects import check_effects
from lopt_pp.config.foreign import (
    Translation,
    eval_strategy_of,
    translate_arguments,
    translate_file,
    translate_settings,
    without_effect,
)
from lopt_pp.config.launch import LaunchConfig
from lopt_pp.config.other_trainers import HINTS
from lopt_pp.config.train_config import COMPONENTS, EFFECTS, Config
from lopt_pp.config.yaml_file import read_yaml
from lopt_pp.errors import LoptError, first_line, shown

logger = logging.getLogger(__name__)

_DESCRIPTION = """\
Post-trains a causal language model by local learning (LoPT), as a pipeline of stages: each process holds a block of the
model's layers, sends detached hidden states forward, and runs its own backward. It starts its own processes:

  lopt-pp train run.yaml
  lopt-pp train --model_name_or_path MODEL --train_file data.jsonl --output_dir out --nproc 2

or is one of those that torchrun, accelerate launch or srun start:

  torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train --config run.yaml

Any flag may be in the YAML file, under its own name without the dashes; flags on the command line win over the file.
"""


def parse_config(
    arguments: Sequence[str],
    prog: str = "lopt-pp train",
    warn: Callable[[str], object] = logger.warning,
    settings: Mapping[str, object] | None = None,
) -> Config:
    """Reads the flags of a run whose processes the caller starts; see `parse_run`.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    config, launch = parse_run(arguments, prog, warn=warn, settings=settings)
    for name, value in vars(launch).items():
        if value != getattr(LaunchConfig(), name):
            warn(f"--{name} {value} is of no effect here: it is for lopt-pp train, which starts its own processes")
    return config


def parse_run(
    arguments: Sequence[str],
    prog: str = "lopt-pp train",
    usage: str = "lopt-pp train [RUN_YAML] FLAGS",
    warn: Callable[[str], object] = logger.warning,
    settings: Mapping[str, object] | None = None,
) -> tuple[Config, LaunchConfig]:
    """Reads the flags of a run and of its processes, and the YAML file that `--config` names or that comes first.

    What the file has under `env` goes into the environment.

    Args:
        arguments: the command line.
        prog, usage: of the help.
        warn: is given a line for each flag that can have no effect, where that does no harm.
        settings: flags with their values, over which those of the command line win.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    components = [*COMPONENTS, LaunchConfig]
    arguments = with_config_flag(arguments)
    (*configs, launch), given = parse_components(components, arguments, prog, usage, _DESCRIPTION, settings)
    config = Config(*configs)
    for warning in [*given.warnings, *check_effects(config, given.names, given.eval_strategy)]:
        warn(warning)
    return config, launch


def with_config_flag(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config` before a YAML file that comes first."""
    is_file = bool(arguments) and not arguments[0].startswith("-")
    return ["--config", *arguments] if is_file else list(arguments)


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
    components: Sequence[type],
    arguments: Sequence[str],
    prog: str,
    usage: str,
    description: str,
    settings: Mapping[str, object] | None = None,
    unused: Container[str] = (),
) -> tuple[list[Any], Given]:
    """Reads flags, ours or TRL's, and the YAML file that `--config` names, into one config of each of the components.

    `settings` are flags with their values, as a file has them; `unused` are those of a file that are left out.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    parser = DataclassParser(components, prog=prog, usage=usage, description=description)
    arguments, path = _take_config_path(arguments)
    known = parser.names
    environment: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    if settings is not None:
        passed_over |= _take(parser, translate_settings(plain_values(settings)), prog)
    if path is not None:
        in_file, environment = read_yaml(path)
        passed_over |= _take(parser, translate_file(path, in_file), prog, f"{path}: ", unused)
    arguments, on_line = translate_arguments(arguments, parser.options)
    passed_over |= on_line.passed_over
    try:
        configs, unknown, names = parser.parse(arguments)
    except LoptError:
        if path is None:  # What the file has may be just what is missed.
            _check_no_file([word for before, word in pairwise(arguments) if not before.startswith("-")], prog)
        raise
    if unknown:
        _check_no_file(unknown[:1], prog)
        name = unknown[0].lstrip("-").split("=")[0].replace("-", "_")
        raise LoptError(f"unknown flag {unknown[0]}{_suggest(name, known, prog)}")
    try:
        for name, value in environment.items():
            os.environ[name] = value
    except (OSError, TypeError, ValueError) as error:
        raise LoptError(f"--config {path}: env: {shown(name)}: {shown(value)}: {first_line(error)}") from error
    warning = without_effect(passed_over)
    return configs, Given(names, eval_strategy_of(passed_over), [warning] if warning else [])


def _check_no_file(words: Iterable[str], prog: str) -> None:
    """Refuses a YAML file among words that belong to no flag."""
    for word in words:
        if word.endswith((".yaml", ".yml")):
            raise LoptError(f"{word}: a YAML file comes first, or after --config: {prog} {word} FLAGS")


def _take(
    parser: DataclassParser, found: Translation, prog: str, source: str = "", unused: Container[str] = ()
) -> dict[str, str]:
    """Has the parser take the flags of a file, or of a mapping, for its defaults; returns those that change nothing."""
    for name in found.flags:
        if name not in parser.names and name not in unused:
            raise LoptError(f"{source}unknown flag {name}{_suggest(name, parser.names, prog)}")
    parser.set_file(found.flags)
    return found.passed_over


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


def load_config(source: str | Path | Mapping[str, object] | Sequence[str] = (), **flags: object) -> Config:
    """Reads what a run is told.

    Args:
        source: path of a YAML file with flags; or a mapping of flags, ours or TRL's, to their values, as such a file
            has them; or a list of flags as on the command line.
        **flags: further ones by their names, such as `max_steps=100`; they win over `source`.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
    """
    # Of several processes, the first of each machine says what all of them would.
    warn = logger.warning if os.environ.get("LOCAL_RANK", "0") == "0" else lambda message: None
    if isinstance(source, Mapping):
        return parse_config(list(_as_arguments(flags)), warn=warn, settings=source)
    if not isinstance(source, str | Path | Sequence):
        raise LoptError(f"load_config: a {type(source).__name__}; give the path of a YAML file, or a dict of flags")
    given = ["--config", str(source)] if isinstance(source, str | Path) else list(source)
    return parse_config([*given, *_as_arguments(flags)], warn=warn)


def plain_values(settings: Mapping[str, object]) -> dict[str, object]:
    """Values as a YAML file would have them: of enumerations their values, paths and dtypes of PyTorch as text."""
    return {str(name): _plain(value) for name, value in settings.items()}


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return plain_values(value)
    is_plain = value is None or isinstance(value, str | int | float)
    return value if is_plain else str(value).removeprefix("torch.")


def _as_arguments(flags: dict[str, object]) -> Iterator[str]:
    for name, value in plain_values(flags).items():
        if value is None:
            raise LoptError(f"--{name}: None is not a value of a flag; leave it out")
        if isinstance(value, list):
            yield from (f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value))
        elif isinstance(value, dict):
            yield from (f"--{name}", *(f"{key}={item}" for key, item in value.items()))
        else:  # "True" and "False" are among the words that a flag takes for a boolean.
            yield f"--{name}={value}"

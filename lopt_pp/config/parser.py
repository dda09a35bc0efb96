"""The flags of a training run: the components' own configs, composed, parsed and checked once."""

import argparse
import dataclasses
import difflib
import os
import typing
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError, first_line, shown

_DESCRIPTION = """\
Post-trains a causal language model by local learning (LoPT), as a pipeline of stages: each process holds a block of the
model's layers, sends detached hidden states forward, and runs its own backward. Start it with torchrun, one process per
stage:

  torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train \\
      --model_name_or_path MODEL --train_file data.jsonl --output_dir out

Any flag may also stand in a YAML file given by --config FILE, under its own name without the dashes; flags on the
command line win over the file.
"""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag once, under the name that the docs use."""

    def add_argument(self, action: argparse.Action) -> None:
        # `--no_NAME` says nothing that `--NAME false` does not.
        if not isinstance(action, argparse._StoreFalseAction):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        kind = getattr(action.type, "__name__", "value").upper()
        value = "|".join(map(str, action.choices)) if action.choices else "BOOL" if kind == "STRING_TO_BOOL" else kind
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, Enum):
            return f"{action.help} (default: {action.default.value})"
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(TrlParser):
    """TRL's parser, whose complaints are raised instead of printed below a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise LoptError(message.removeprefix("argument "))


def parse_config(arguments: Sequence[str], prog: str = "lopt-pp train") -> Config:
    """Reads the flags of a run, and the YAML file that `--config` names, whose `env` goes into the environment.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    components: list[Any] = [component.type for component in dataclasses.fields(Config)]
    usage = "torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train [--config FILE] FLAGS"
    return Config(*parse_components(components, arguments, prog, usage, _DESCRIPTION))


def parse_components(
    components: Iterable[Any], arguments: Sequence[str], prog: str, usage: str, description: str
) -> list[Any]:
    """Reads flags, and the YAML file that `--config` names, into one config of each of the components.

    Raises:
        LoptError: an unknown flag, a value of the wrong type or out of range, an unreadable file.
        SystemExit: after `--help`.
    """
    parser = _Parser(
        components,
        prog=prog,
        usage=usage,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    arguments, path = _take_config_path(arguments)
    known = {action.dest for action in parser._actions} - {"help"}
    environment: dict[Any, Any] = {}
    if path is not None:
        settings = _read_file(path)
        environment = settings.pop("env", {})
        for name in settings:
            if name not in known:
                raise LoptError(f"{path}: unknown flag {name}{_suggest(name, known)}")
        parser.set_defaults_with_config(**settings)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise LoptError(f"unknown flag {unknown[0]}{_suggest(unknown[0].lstrip('-').split('=')[0], known)}")
    try:
        for name, value in environment.items():
            os.environ[name] = str(value)
    except (OSError, TypeError, ValueError) as error:
        raise LoptError(f"--config {path}: env: {shown(name)}: {shown(value)}: {first_line(error)}") from error
    return parsed


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
    return arguments[:position] + arguments[position + 2 :], Path(arguments[position + 1])


def _read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with plain values below `env`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise LoptError(f"--config {path}: {error}") from error
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # Besides YAMLError, whatever a malformed tag makes of a value: there is no list of it.
        raise LoptError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise LoptError(f"--config {path}: expected lines of the form 'flag: value'")
    environment = content.get("env", {})
    if not isinstance(environment, dict) or any(isinstance(value, list | dict) for value in environment.values()):
        raise LoptError(f"--config {path}: env: expected lines of the form 'NAME: value' below it")
    return content


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
            raise LoptError(f"--{name}: None is no value of a flag; leave it out")
        if isinstance(value, list | tuple):
            yield from (f"--{name}", *map(str, value))
        elif isinstance(value, Enum):
            yield f"--{name}={value.value}"
        else:  # "True" and "False" are among the words that a flag takes for a boolean.
            yield f"--{name}={value}"

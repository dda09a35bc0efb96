"""`lopt-pp completion SHELL`: what makes a shell complete commands, flags, choices and files.

eval "$(lopt-pp completion bash)"                                     in ~/.bashrc
lopt-pp completion zsh > "${fpath[1]}/_lopt-pp"                       once, for zsh
lopt-pp completion fish > ~/.config/fish/completions/lopt-pp.fish     once, for fish
"""

import argparse
import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Sequence
from typing import Any

import lopt_pp.commands
from lopt_pp.commands.common import CommandParser, home_path
from lopt_pp.config.arguments import CompletedParser, OwnParser
from lopt_pp.config.train_config import COMPONENTS

_FLAGS_IN_FILE = ("train", "plan")
"""Commands whose flags may be in a YAML file, which comes first."""

_PATHS = {
    field.name for component in COMPONENTS for field in dataclasses.fields(component) if field.metadata["is_path"]
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser(
        "lopt-pp completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"], metavar="bash|zsh|fish")
    given = parser.read(arguments)
    # Late, as nothing else needs it.
    import shtab

    print(shtab.complete(whole_parser(), given.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser that knows the flags of all commands."""
    whole = argparse.ArgumentParser("lopt-pp")
    whole.add_argument("--version", action="store_true", help="show the version")
    commands: Any = whole.add_subparsers(dest="command", parser_class=CompletedParser)
    for command in command_names():
        found = OwnParser.asked_for(_module(command).main)
        shown = commands.add_parser(command, parents=[found], add_help=False, help=_first_sentence(found))
        for action in shown.actions:
            is_value = not action.option_strings and not action.choices
            if is_value or action.type is home_path or action.dest in _PATHS:
                _complete_files(action)
        if command in _FLAGS_IN_FILE:
            _complete_files(shown.add_argument("--config", help="YAML file with flags"))
            _complete_files(shown.add_argument("run_yaml", nargs="?", help="YAML file with flags"))
    return whole


def command_names() -> list[str]:
    """The commands: each has a module with its function."""
    names = [module.name for module in pkgutil.iter_modules(lopt_pp.commands.__path__)]
    return [name for name in names if hasattr(_module(name), "main")]


def _module(name: str) -> Any:
    return importlib.import_module(f"lopt_pp.commands.{name}")


def _complete_files(action: argparse.Action) -> None:
    import shtab

    action.complete = shtab.FILE  # type: ignore[attr-defined]


def _first_sentence(parser: argparse.ArgumentParser) -> str:
    words = " ".join((parser.description or "").split("\n\n")[0].split())
    return re.split(r"[.:;](?: |$)", re.sub(r"^`lopt-pp [^`]*`: ", "", words))[0]

"""Config dataclasses as flags of a command line: what `trl.TrlParser` makes of them, without its imports.

TRL brings torch and transformers with it, and `--help` would wait for them. A test holds each flag against the one that
`TrlParser` makes of the same field.
"""

import argparse
import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, ClassVar, Literal

from lopt_pp.errors import LoptError

_YES = ("yes", "true", "t", "y", "1")
_NO = ("no", "false", "f", "n", "0")

_NOT_GIVEN: Any = object()
"""In place of the value of a flag that the command line does not have."""


class AskedParser(BaseException):
    """A command's parser, in place of its help, for whoever asks by `asked_for`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


class OwnParser(argparse.ArgumentParser):
    """A parser that can be had where only the command's function is known, which makes it."""

    _is_asked_for: ClassVar[bool] = False

    @classmethod
    def asked_for(cls, command: Callable[[list[str]], object]) -> argparse.ArgumentParser:
        """The parser of a command.

        Args:
            command: reads its arguments by one.

        Raises:
            TypeError: it does not.
        """
        OwnParser._is_asked_for = True
        try:
            command(["--help"])
        except AskedParser as answer:
            return answer.parser
        finally:
            OwnParser._is_asked_for = False
        raise TypeError(f"{command} has no help by an OwnParser")

    def print_help(self, file: Any = None) -> None:
        """Prints the help, or hands itself over where it is asked for."""
        if self._is_asked_for:
            raise AskedParser(self)
        super().print_help(file)


class CompletedParser(argparse.ArgumentParser):
    """A command's parser, given as its parent, as a shell completes it: each flag once, by the name in the docs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for action in list(self._actions):
            if isinstance(action, argparse._StoreFalseAction):  # `--no_NAME` says nothing that `--NAME false` does not.
                self._remove_action(action)
            action.option_strings = action.option_strings[:1]
            action.required = False

    @property
    def actions(self) -> list[argparse.Action]:
        """Its flags and values."""
        return list(self._actions)


class DataclassParser(OwnParser):
    """A parser whose flags are the fields of config dataclasses, and whose errors are raised.

    A field `max_steps` is the flag `--max_steps`, or `--max-steps`. By its type: a `bool` takes a word such as `true`
    or `no`, or nothing for true, and has a twin `--no_NAME` where it is true by default; a `Literal` of strings takes
    one of them; a list takes one value or more; a number that may be None takes `none` too. A field without a default
    is required.

    Args:
        components: the dataclasses; `_argument_group_name` of each is the title of its flags in the help.
        prog, usage, description: of the help.

    Raises:
        TypeError: a field has a type that no flag can have.
    """

    def __init__(self, components: Sequence[type], prog: str, usage: str, description: str) -> None:
        super().__init__(prog, usage, description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self._components = components
        self._in_file: set[str] = set()
        for component in components:
            group = self.add_argument_group(component._argument_group_name)  # type: ignore[attr-defined]
            declared = typing.get_type_hints(component)
            for field in dataclasses.fields(component):
                _add_flag(group, field, declared[field.name])

    @property
    def names(self) -> set[str]:
        """Of the fields."""
        return {field.name for component in self._components for field in dataclasses.fields(component)}

    @property
    def options(self) -> set[str]:
        """The names of all flags, with underscores and without the dashes in front, and their twins `no_NAME`."""
        return {name.lstrip("-").replace("-", "_") for action in self._actions for name in action.option_strings}

    def set_file(self, settings: Mapping[str, Any]) -> None:
        """Takes values of a file for defaults, by the fields' names; strings are read as on a command line.

        YAML's other words for booleans, `on` and `off`, are understood as well. What has no value is not given.
        """
        for action in self._actions:
            value = settings.get(action.dest)
            if value is None:
                continue
            if action.type is _boolean and isinstance(value, str):
                value = {"on": "true", "off": "false"}.get(value.lower(), value)
            action.default, action.required = value, False
            self._in_file.add(action.dest)

    def parse(self, arguments: Sequence[str]) -> tuple[list[Any], list[str], set[str]]:
        """Reads a command line.

        Returns:
            One config of each component; what is neither a flag nor a value of one; and the fields that are given, by
            their names, in the file or on the command line.

        Raises:
            LoptError: a value of the wrong type or out of range, or a required flag is missing.
            SystemExit: after `--help`.
        """
        names = self.names
        nothing = argparse.Namespace(**dict.fromkeys(names, _NOT_GIVEN))
        read, unknown = self.parse_known_args(arguments, nothing)
        values = {name: value for name, value in vars(read).items() if name in names and value is not _NOT_GIVEN}
        given = values.keys() | self._in_file
        for action in self._actions:
            if action.dest in names and action.dest not in values:
                values[action.dest] = self._default_of(action)
        configs = [
            component(**{field.name: values[field.name] for field in dataclasses.fields(component)})
            for component in self._components
        ]
        return configs, unknown, given

    def _default_of(self, action: argparse.Action) -> Any:
        """Its value where the command line has none; a file's words are read as the command line's are."""
        try:
            if not isinstance(action.default, str):
                return action.default
            value = self._get_value(action, action.default)
            return [value] if action.nargs == "+" else value  # A list of one.
        except argparse.ArgumentError as error:
            text = str(error)
            self.error(text if len(text) <= 400 else text[:400] + "...")

    def error(self, message: str) -> typing.NoReturn:
        """Says what is wrong without a page of usage above it."""
        # Of a flag's two names, with underscores and with dashes, the first will do.
        raise LoptError(re.sub(r"(--\w+)/--[\w-]+", r"\1", message.removeprefix("argument ")))


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field[Any], declared: Any) -> None:
    names = list(dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"]))
    text = field.metadata["help"]
    if field.default is dataclasses.MISSING:
        group.add_argument(*names, help=text, required=True, **_value_of(field.name, declared))
        return
    group.add_argument(*names, help=text, default=field.default, **_value_of(field.name, declared))
    if field.default is True:
        twins = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
        group.add_argument(*twins, help=text, action="store_false", dest=field.name, default=False)


def _value_of(name: str, declared: Any) -> dict[str, Any]:
    """What argparse is told of the values of a flag, by the type of its field."""
    kinds = [kind for kind in typing.get_args(declared) if kind is not NoneType]
    is_optional = NoneType in typing.get_args(declared) and len(kinds) == 1
    if is_optional:
        (declared,) = kinds
    if declared is bool:
        return {"type": _boolean, "nargs": "?", "const": True}
    if typing.get_origin(declared) is Literal and all(isinstance(choice, str) for choice in typing.get_args(declared)):
        return {"choices": typing.get_args(declared)}
    if declared in (list[str], list[int], list[float]):
        return {"type": typing.get_args(declared)[0], "nargs": "+"}
    if declared == list[dict[str, Any]]:
        return {"type": _mapping, "nargs": "+"}
    if declared is str:
        return {"type": _text_or_none if is_optional else _text}
    if declared in (int, float):
        return {"type": _or_none(declared) if is_optional else declared}
    raise TypeError(f"{name}: no flag has values of the type {declared}")


def _boolean(word: str) -> bool:
    if word.lower() in _YES:
        return True
    if word.lower() in _NO:
        return False
    raise argparse.ArgumentTypeError(
        f"Truthy value expected: got {word} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


def _or_none(kind: type) -> Callable[[str], Any]:
    """Reads numbers, and the words `none` and `null` for None."""

    def read(word: str) -> Any:
        return None if word.lower() in ("none", "null") else kind(word)

    read.__name__ = kind.__name__  # What argparse calls the type in its errors.
    return read


def _mapping(word: str) -> dict[str, Any]:
    """Reads a JSON object, of a list of mappings."""
    value = json.loads(word) if word else {}
    if not isinstance(value, dict):
        raise ValueError(word)
    return value


def _text(word: str) -> Any:
    """Reads text; `None` is what a script writes in place of a value that it does not have."""
    return _NOT_GIVEN if word in ("None", "null") else word


def _text_or_none(word: str) -> str | None:
    return None if word in ("None", "null") else word


_mapping.__name__ = "dict"
_text.__name__ = _text_or_none.__name__ = "str"


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each flag once, under the name that the docs use."""

    def add_argument(self, action: argparse.Action) -> None:
        # `--no_NAME` says nothing that `--NAME false` does not.
        if not isinstance(action, argparse._StoreFalseAction):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        if action.choices:
            value = "|".join(map(str, action.choices))
        else:
            value = "BOOL" if action.type is _boolean else getattr(action.type, "__name__", "value").upper()
        return f"{action.option_strings[0]} {value}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

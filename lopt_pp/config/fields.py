"""Checks that the fields of a config have the types that they declare."""

import math
import types
import typing
from typing import Any, ClassVar, Literal

from lopt_pp.errors import LoptError, shown


def check_types(config: Any) -> None:
    """Checks every field of a config dataclass; for its `__post_init__`.

    The command line gives right types by itself; a YAML file or a caller in Python may not.

    Raises:
        LoptError: names the field, its value and what is expected: the type, of a number that it is finite and fits
            64 bits, of a string that it is not empty and that a file could have it for a name.
    """
    for name, declared in typing.get_type_hints(type(config)).items():
        if typing.get_origin(declared) is ClassVar:
            continue
        value = getattr(config, name)
        kinds = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
        if isinstance(value, float) and not math.isfinite(value):
            raise LoptError(f"--{name} {value}: expected a finite number")
        if not any(_is_of(value, kind) for kind in kinds):
            expected = " or ".join(map(_describe, kinds))
            raise LoptError(f"--{name} {shown(value)}: of the wrong type; expected {expected}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise LoptError(f"--{name}: expected a number of at most 64 bits")
        if isinstance(value, str) and (not value or "\0" in value):
            raise LoptError(f"--{name} {shown(value)}: expected a string that is not empty and has no zero character")


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(item, typing.get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list, each {_describe(typing.get_args(kind)[0])}"
    return {
        type(None): "nothing",
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }.get(kind, getattr(kind, "__name__", str(kind)))

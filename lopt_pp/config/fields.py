"""What every flag says of itself where it is defined, and the check that its value has the type that it declares."""

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Literal

from lopt_pp.errors import LoptError, shown


class Resume(Enum):
    """What it means that a run goes on from a checkpoint with another value of a flag than the run that wrote it."""

    MUST_MATCH = "It would be another run: it is refused."
    MAY_CHANGE = "The stages learn otherwise from there on: it is warned of."
    DERIVED = (
        "The flag decides something that is compared in its place, such as the digest of the training rows. "
        "`lopt_pp.checkpoint.compatibility` says what, and whether a difference is refused or warned of."
    )
    NO_EFFECT = "The stages learn the same, but for rounding: it is not compared."


@dataclass(frozen=True)
class Effects:
    """What a flag of a training run affects.

    Attributes:
        on_resume: the result, seen from a run that goes on from a checkpoint.
        shared_by_ranks: the agreement between ranks: whether all must be given the same value. Paths of a machine need
            not be the same (what they hold is compared), nor what only says where and how often something is told.
        compared: the comparison of runs: whether `lopt-pp compare` lists a difference.
    """

    on_resume: Resume
    shared_by_ranks: bool
    compared: bool


def flag(
    help: str,
    *,
    on_resume: Resume,
    shared_by_ranks: bool,
    compared: bool,
    is_path: bool = False,
    is_secret: bool = False,
) -> dict[str, Any]:
    """Metadata of a dataclass field that is a flag of a training run.

    There are no defaults of what it affects: whoever adds a flag decides all three, or the package cannot be imported.

        seed: int = field(
            default=42,
            metadata=flag("Seed of ...", on_resume=Resume.MUST_MATCH, shared_by_ranks=True, compared=True),
        )

    Args:
        help: what `--help` says of it.
        on_resume, shared_by_ranks, compared: see `Effects`.
        is_path: whether its value is a path, or may be one; see `expand_home`.
        is_secret: whether its value may be written nowhere; `Config.flags` leaves it out.
    """
    effects = Effects(on_resume, shared_by_ranks, compared)
    return {"help": help, "effects": effects, "is_path": is_path, "is_secret": is_secret}


def effects_of(component: type) -> dict[str, Effects]:
    """What each flag of a config dataclass affects, by the flag's name.

    Raises:
        TypeError: a flag does not say it.
    """
    effects = {}
    for field in dataclasses.fields(component):
        said = field.metadata.get("effects")
        if not isinstance(said, Effects):
            raise TypeError(f"{component.__name__}.{field.name} does not say what it affects: metadata=flag(...) does")
        effects[field.name] = said
    return effects


def expand_home(config: Any) -> None:
    """Puts the home directory in place of `~` at the beginning of a config's paths; for its `__post_init__`.

    A shell does so in `--train_file ~/rows.jsonl`, but not in `--train_file=~/rows.jsonl`, and YAML never does.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.metadata.get("is_path"):
            continue
        if isinstance(value, str):
            object.__setattr__(config, field.name, os.path.expanduser(value))
        elif isinstance(value, list):
            expanded = [os.path.expanduser(item) if isinstance(item, str) else item for item in value]
            object.__setattr__(config, field.name, expanded)


def check_types(config: Any) -> None:
    """Checks every field of a config dataclass; for its `__post_init__`.

    The command line gives right types by itself; a YAML file or a caller in Python may not.

    Raises:
        LoptError: names the field, its value and what is expected: the type, of a number that it is finite and fits
            64 bits, of a string that it is not empty and that a file could have it for a name.
    """
    secret = {field.name for field in dataclasses.fields(config) if field.metadata.get("is_secret")}
    for name, declared in typing.get_type_hints(type(config)).items():
        if typing.get_origin(declared) is ClassVar:
            continue
        value = getattr(config, name)
        said = "..." if name in secret else shown(value)
        is_union = typing.get_origin(declared) in (typing.Union, types.UnionType)
        kinds = typing.get_args(declared) if is_union else (declared,)
        if isinstance(value, float) and not math.isfinite(value):
            raise LoptError(f"--{name} {value}: expected a finite number")
        if not any(_is_of(value, kind) for kind in kinds):
            choices = [
                str(word) for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)
            ]
            if isinstance(value, str) and choices:  # As argparse says it.
                raise LoptError(f"--{name}: invalid choice: {said} (choose from {', '.join(choices)})")
            expected = " or ".join(map(_describe, kinds))
            if str in kinds and type(value) in (int, float):
                expected += f", such as '{value}' in quotes"
            raise LoptError(f"--{name} {said}: of the wrong type; expected {expected}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise LoptError(f"--{name}: expected a number of at most 64 bits")
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and (not text or "\0" in text) for text in texts):
            what = "strings that are not empty and have" if len(texts) > 1 else "a string that is not empty and has"
            said = shown(texts[0]) if len(texts) == 1 and name not in secret else said
            raise LoptError(f"--{name} {said}: expected {what} no zero character")


def _is_of(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list, each {_describe(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is dict:
        return "keys and values"
    return {
        type(None): "nothing",
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
    }.get(kind, getattr(kind, "__name__", str(kind)))

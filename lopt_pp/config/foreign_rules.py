"""What can become of a flag of another trainer: it is taken for ours, passed over, or refused with a hint."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lopt_pp.errors import shown

Rule = Callable[[str, Any], "dict[str, Any] | str"]
"""Of a flag's name and value: the flags of ours that mean the same, none where it changes nothing here; or why it is
refused, where an empty text is the row's own note."""

SAME = "the same"
NO_EFFECT = "no effect"
MISSING = "-"

INVALID = "invalid choice: "
"""Why a value is refused that is none of those there are; in argparse's words."""

_OFF = ("false", "no", "off", "none", "null", "", "0", "0.0", "{}", "[]")


def word_of(value: Any) -> str:
    """A value as a word in lower case; empty for a list or a mapping without anything in it."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | dict):
        return "..." if value else ""
    return str(value).lower()


def ignored(name: str, value: Any) -> dict[str, Any]:
    """Whatever it is, it changes nothing here."""
    return {}


def unless(*harmless: str) -> Rule:
    """Refused, but for its being off and for some other values that change nothing."""

    def rule(name: str, value: Any) -> dict[str, Any] | str:
        return {} if word_of(value) in (*_OFF, *harmless) else ""

    return rule


def renamed(ours: str) -> Rule:
    return lambda name, value: {ours: value}


def by_value(values: Mapping[str, Mapping[str, Any] | str]) -> Rule:
    """By the word; others are refused. All words for true and false are `true` and `false` here."""

    def rule(name: str, value: Any) -> dict[str, Any] | str:
        word = word_of(value)
        word = {"yes": "true", "1": "true", "no": "false", "off": "false", "0": "false"}.get(word, word)
        found = values.get(word_of(value), values.get(word, ""))
        return found if isinstance(found, str) else dict(found)

    return rule


def one_of(values: Mapping[str, Mapping[str, Any]]) -> Rule:
    """By the word, which is one of these, or `none`: others are mistakes."""
    known = by_value({"none": {}, **values})

    def rule(name: str, value: Any) -> dict[str, Any] | str:
        found = known(name, value)
        return found if isinstance(found, dict) else f"{INVALID}{shown(value)} (choose from {', '.join(values)})"

    return rule


def same(name: str, value: Any) -> dict[str, Any]:
    return {name: value}


def unless_none(name: str, value: Any) -> dict[str, Any]:
    """Ours, where None means here, too, that it is not given."""
    return {} if value is None or word_of(value) in ("none", "null") else {name: value}


def share_of_steps(other: str) -> Rule:
    """A number of steps; below 1 it is a share of all steps there."""

    def rule(name: str, value: Any) -> dict[str, Any] | str:
        try:
            is_share = 0 < float(value) < 1
        except (TypeError, ValueError):
            return {name: value}
        if not is_share:
            return {name: value}
        return {other: value} if other else "a whole number of steps; a share of all steps is not understood here"

    return rule


def dtype(name: str, value: Any) -> dict[str, Any] | str:
    word = word_of(value).removeprefix("torch.")
    if word in ("fp16", "half"):
        return "float16 would need its loss scaled; take bfloat16"
    if word == "auto":
        return "give float32 or bfloat16, for the computation; --save_dtype is that of the result"
    known = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32", "float": "float32"}
    return {name: known.get(word, value)}


def trackers(name: str, value: Any) -> dict[str, Any] | str:
    """One or several; YAML has them as a word or a list, and an empty list for none."""
    several = value if isinstance(value, list) else [value]
    return {name: several if several else ["none"]}


def checkpointing_kwargs(name: str, value: Any) -> dict[str, Any] | str:
    """The way of recomputing changes no result."""
    if isinstance(value, dict) and value.keys() <= {"use_reentrant"}:
        return {}
    word = word_of(value).replace(" ", "").replace("'", '"')
    return {} if word in (*_OFF, '{"use_reentrant":false}', '{"use_reentrant":true}') else ""


def max_length(name: str, value: Any) -> dict[str, Any] | str:
    if value is None or word_of(value) in ("none", "null"):
        return "rows need a longest length here; give one that none of yours exceeds"
    return {name: value}


def model_init_kwargs(name: str, value: Any) -> dict[str, Any] | str:
    """Of what `from_pretrained` is given, what flags say as well."""
    if isinstance(value, str) and value.strip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "expected a mapping"
    if not isinstance(value, dict):
        return {} if word_of(value) in _OFF else "expected a mapping"
    flags = {"revision": "model_revision", "torch_dtype": "dtype"}
    found: dict[str, Any] = {}
    for key, own in value.items():
        flag = flags.get(key, key)
        if flag not in ("attn_implementation", "dtype", "model_revision", "trust_remote_code"):
            return f"{key} has no flag here: the model is as its config says"
        said = dtype(flag, own) if flag == "dtype" else {flag: own}
        if isinstance(said, str):
            return said
        found |= said
    return found


def resume(name: str, value: Any) -> dict[str, Any] | str:
    if word_of(value) == "true":
        return "give latest, or the directory of a checkpoint"
    return {} if word_of(value) == "false" else {name: value}


@dataclass(frozen=True)
class Row:
    """Flags that are treated alike.

    Attributes:
        names: of TRL's flags, with spaces between them.
        here: names of our flags that they become, with spaces between them; or `SAME`, `NO_EFFECT`, `MISSING`.
        note: what docs/trl.md says of them, and the error where they are refused; in Markdown.
        rule: what becomes of a value.
    """

    names: str
    here: str
    note: str = ""
    rule: Rule = same

    @property
    def flags(self) -> list[str]:
        return self.names.split()

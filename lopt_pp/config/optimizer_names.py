"""The optimizers that `--optim` names, without an import of any of them; and flags that are settings by name.

`lopt_pp.stage.optimizer_kinds` makes them.
"""

import importlib.util
import json
from dataclasses import dataclass
from typing import Any, Literal

from lopt_pp.errors import LoptError, shown

Optim = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "muon",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedule_free_radam",
]
"""The names of transformers' `OptimizerNames` that fit a stage's own parameters, and `muon`, which is PyTorch's."""

ADAMW_STATE = "adamw"


@dataclass(frozen=True)
class OptimizerKind:
    """What is known of an optimizer before it is made.

    Attributes:
        package: that it needs besides PyTorch and transformers, by the name that it is installed and imported by.
        state: a name of the state that it keeps. A run goes on from a checkpoint with this state only.
        unsharded: why its state cannot be shared out among replicas; empty where it can.
        offloads: whether it may step over some parameters at a time, with the state of the others elsewhere.
    """

    package: str | None
    state: str
    unsharded: str = ""
    offloads: bool = True


_BLOCKWISE = "bitsandbytes steps over whole tensors"

_FOUND: dict[str, OptimizerKind] = {
    "adamw_torch_fused": OptimizerKind(None, ADAMW_STATE),
    "adamw_torch": OptimizerKind(None, ADAMW_STATE),
    "adafactor": OptimizerKind(None, "adafactor", "it takes means over the rows and columns of whole matrices"),
    "sgd": OptimizerKind(None, "sgd"),
    "adagrad": OptimizerKind(None, "adagrad"),
    "rmsprop": OptimizerKind(None, "rmsprop"),
    "muon": OptimizerKind(None, "muon", "it makes whole matrices orthogonal"),
}


def optimizer_kind(name: str) -> OptimizerKind:
    """What is known of the optimizer of this name, one of `Optim`."""
    if name in _FOUND:
        return _FOUND[name]
    if name.startswith("schedule_free"):
        # Its averages count their steps for all parameters together.
        return OptimizerKind("schedulefree", name, offloads=False)
    bits = 8 if "8bit" in name else 32
    family = next(family for family in ("ademamix", "adamw", "lion") if family in name)
    return OptimizerKind("bitsandbytes", f"{family}_bnb_{bits}bit", _BLOCKWISE, offloads="paged" not in name)


def check_optimizer_installed(name: str) -> None:
    """Sees that the package of an optimizer is there, without importing it.

    Raises:
        LoptError: it is not.
    """
    package = optimizer_kind(name).package
    if package is not None and importlib.util.find_spec(package) is None:
        raise LoptError(f"--optim {name} needs the package {package}: pip install {package}")


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """The settings in the value of `--optim_args`: `key=value`, several with commas between them.

    Words for true, false and none and numbers are taken for what they say; other values are text.

    Raises:
        LoptError: it is of another form.
    """
    settings: dict[str, Any] = {}
    for pair in (text or "").replace(" ", "").split(","):
        key, equals, value = pair.partition("=")
        if pair and not (key and equals and value):
            raise LoptError(f"--optim_args {shown(text)}: give key=value, several with commas between them")
        if pair:
            settings[key] = _value(value)
    for key, flag in _OWN_FLAGS.items():
        if key in settings:
            raise LoptError(f"--optim_args {key}={settings[key]}: give {flag}")
    return settings


_OWN_FLAGS = {
    "lr": "--learning_rate",
    "weight_decay": "--weight_decay",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
    "fused": "--optim adamw_torch_fused or adamw_torch",
    "warmup_steps": "--warmup_steps",
}
"""Settings that flags of their own say."""


def _value(word: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if word.lower() in words:
        return words[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def mapping_text(flag: str, value: Any) -> str | None:
    """Settings by name as JSON text with sorted keys, which a frozen config can hold.

    Args:
        flag: its name, for messages.
        value: a mapping, as from a YAML file or Python, or JSON text of one; None or an empty one for none.

    Raises:
        LoptError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise LoptError(f"--{flag} {shown(value)}: expected JSON, such as '{{\"key\": 0.1}}' ({error})") from error
    if not value and value in (None, {}):
        return None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise LoptError(f"--{flag} {shown(value)}: expected settings by name, such as '{{\"key\": 0.1}}'")
    try:
        return json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise LoptError(f"--{flag} {shown(value)}: expected numbers, words and lists of them ({error})") from error


def mapping_of(text: str | None) -> dict[str, Any]:
    """What `mapping_text` has made text of."""
    found: dict[str, Any] = {} if text is None else json.loads(text)
    return found

"""Configs that differ in one flag, and what a run has beside its flags."""

import dataclasses
import types
import typing
from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig

from lopt_pp.config.train_config import COMPONENTS, EFFECTS, Config

COMPONENT_OF = {field.name: component for component in COMPONENTS for field in dataclasses.fields(component)}

GROUP_OF = {
    name: group.name
    for name, kind in COMPONENT_OF.items()
    for group in dataclasses.fields(Config)
    if group.type is kind
}

MODEL = LlamaConfig(num_hidden_layers=4)

GIVEN: dict[str, dict[str, Any]] = {
    "dataset_name": {"train_file": None, "dataset_name": "one"},
    "datasets": {"train_file": None, "datasets": [{"path": "one"}]},
    "eval_on_start": {"eval_file": "held.jsonl"},
    "load_best_model_at_end": {"eval_file": "held.jsonl"},
    "metric_for_best_model": {"eval_file": "held.jsonl"},
    "early_stopping_patience": {"eval_file": "held.jsonl"},
    "eval_strategy": {"eval_file": "held.jsonl"},
    "eval_metrics": {"eval_file": "held.jsonl"},
    "compute_metrics": {"eval_file": "held.jsonl"},
}
"""What a flag needs beside it."""


def make(**flags: Any) -> Config:
    flags = {"model_name_or_path": "a-model", "output_dir": "out", "train_file": ["rows.jsonl"]} | flags
    groups: dict[str, Any] = {group.name: {} for group in dataclasses.fields(Config)}
    for name, value in flags.items():
        groups[GROUP_OF[name]][name] = value
    return Config(**{group.name: group.type(**groups[group.name]) for group in dataclasses.fields(Config)})  # type: ignore


def another(name: str, value: object) -> object:
    """A value of the flag's type that is not the one it has."""
    declared = typing.get_type_hints(COMPONENT_OF[name])[name]
    is_union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    kinds = typing.get_args(declared) if is_union else (declared,)
    (kind,) = [kind for kind in kinds if kind is not type(None)]
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if typing.get_origin(kind) is list:
        return [_OTHER_ITEMS.get(name, "other")]
    if kind is bool:
        return not value
    if kind is int:
        return 1 if value is None else value + 2  # type: ignore[operator]
    if kind is float:
        return 0.5 if value is None else value / 2 + 0.25  # type: ignore[operator]
    return _OTHER_TEXTS.get(name, "other")


_OTHER_ITEMS: dict[str, object] = {
    "report_to": "tensorboard",
    "eval_metrics": "entropy",
    "train_metrics": "entropy",
    "datasets": {"path": "other"},
}

_OTHER_TEXTS = {
    "split": "2",
    "auxiliary_choice": "2",
    "trace": "1-2",
    "profile_steps": "1-2",
    "optim_args": "key=1",
    "lr_scheduler_kwargs": '{"key": 1}',
}


def two_configs(name: str) -> tuple[Config, Config]:
    """Two that differ in one flag."""
    given = GIVEN.get(name, {})
    before = make(**given)
    after = make(**given | {name: another(name, _values(before)[name])})
    assert [flag for flag in EFFECTS if _values(before)[flag] != _values(after)[flag]] == [name]
    return before, after


def _values(config: Config) -> dict[str, Any]:
    """Of all flags, with those that are written nowhere."""
    return {name: value for component in vars(config).values() for name, value in vars(component).items()}


def rows(digest: str = "rows") -> Any:
    return SimpleNamespace(digest=digest)

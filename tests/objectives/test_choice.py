"""Which objective the flags name, and what is said where they name none."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import own_objective
import pytest
import torch

from lopt_pp import Trainer
from lopt_pp.config.parser import parse_config
from lopt_pp.errors import LoptError
from lopt_pp.objectives import (
    AuxiliaryNextToken,
    Objective,
    ObjectiveConfig,
    Reconstruction,
    Site,
    local_objective_class,
    make_objective,
    nothing_to_load,
)


def make_site(config: ObjectiveConfig, hidden_size: int = 16) -> Site:
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
    block: Any = SimpleNamespace(model=model, spec=SimpleNamespace(stage=3))
    return Site(block, config, torch.Generator().manual_seed(0), nothing_to_load)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({}, Reconstruction),
        ({"local_objective": "reconstruction"}, Reconstruction),
        ({"local_objective": "next_token"}, AuxiliaryNextToken),
        ({"local_objective": "own_objective:TokenItself"}, own_objective.TokenItself),
        ({"local_objective": "none"}, None),
        ({"method": "frozen"}, None),
        ({"method": "e2e"}, None),
    ],
)
def test_the_flags_name_an_objective(given: dict[str, Any], kind: type[Objective] | None) -> None:
    assert local_objective_class(ObjectiveConfig(**given)) is kind


def test_an_objective_of_ones_own_is_made_from_its_site() -> None:
    config = ObjectiveConfig(local_objective="own_objective:TokenItself")
    objective = make_objective(own_objective.TokenItself, make_site(config))
    again = make_objective(own_objective.TokenItself, make_site(config))
    assert isinstance(objective, own_objective.TokenItself) and objective.head.in_features == 16
    assert torch.equal(objective.head.weight, own_objective.TokenItself(make_site(config)).head.weight)
    assert isinstance(again, own_objective.TokenItself) and torch.equal(again.head.weight, objective.head.weight)
    assert isinstance(make_objective(own_objective.Small, make_site(config)), own_objective.Small)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("recon", "give reconstruction, next_token, none, or an objective of your own as package.module:Class"),
        ("own_objective:", "give reconstruction, next_token, none, or"),
        (":Small", "give reconstruction, next_token, none, or"),
        ("no.such:Small", "no.such cannot be imported: ModuleNotFoundError: No module named 'no'"),
        ("own_objective:Missing", "own_objective has no Missing"),
        ("own_objective:NoObjective", "NoObjective is not a subclass of lopt_pp.objectives.Objective"),
        ("own_objective:torch", "torch is not a subclass of lopt_pp.objectives.Objective"),
        ("own_objective:Unfinished", "Unfinished does not define forward"),
        ("own_objective:Nameless", "Nameless needs a name that ends in _loss"),
        ("own_objective:OtherArguments", r"OtherArguments is made by OtherArguments\(site\).*'depth'"),
    ],
)
def test_what_names_none_is_an_unusable_flag(name: str, error: str) -> None:
    required = "--model_name_or_path a-model --train_file rows.jsonl --output_dir out"
    with pytest.raises(LoptError, match=f"^--local_objective {name}: .*{error}"):
        Trainer(parse_config([*required.split(), "--local_objective", name]))


def test_a_module_that_fails_on_its_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_objective.py").write_text("raise RuntimeError('half written')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(LoptError, match="broken_objective cannot be imported: RuntimeError: half written"):
        local_objective_class(ObjectiveConfig(local_objective="broken_objective:Small"))


def test_a_constructor_that_fails() -> None:
    site = make_site(ObjectiveConfig(local_objective="own_objective:Fails"))
    with pytest.raises(LoptError, match=r"Fails: Fails\(site\) fails for stage 3 with ValueError: no such head$"):
        make_objective(own_objective.Fails, site)


@pytest.mark.parametrize(
    ("flag", "value", "error"),
    [
        ("reconstruction_weight", -0.5, "at least 0"),
        ("auxiliary_layers", 0, "at least 1"),
        ("auxiliary_choice", "odd", "even, all, or layer numbers such as 15,19,24,29"),
        ("auxiliary_choice", "7,5", "layer numbers above 0 that ascend"),
        ("auxiliary_choice", "0,5", "layer numbers above 0 that ascend"),
        ("local_head_warmup_steps", -1, "at least 0"),
        ("local_accumulation_steps", 0, "at least 1"),
        ("max_interface_drift", -0.1, "at least 0"),
        ("method", "other", "choose from lopt, frozen, e2e"),
        ("train_embeddings", "no", "expected true or false"),
    ],
)
def test_values(flag: str, value: object, error: str) -> None:
    with pytest.raises(LoptError, match=f"^--{flag}:? .*{error}"):
        ObjectiveConfig(**{flag: value})  # type: ignore[arg-type]


def test_a_drift_that_is_not_measured_cannot_be_too_large() -> None:
    required = "--model_name_or_path a-model --train_file rows.jsonl --output_dir out --max_interface_drift 0.5"
    assert parse_config(required.split()).objective.max_interface_drift == 0.5
    with pytest.raises(
        LoptError, match="^--max_interface_drift needs a drift that is measured: --probe_steps above 0$"
    ):
        parse_config([*required.split(), "--probe_steps", "0"])


def test_no_more_is_learned_from_than_there_is() -> None:
    required = "--model_name_or_path a-model --train_file rows.jsonl --output_dir out --local_accumulation_steps 3"
    assert parse_config([*required.split(), "--gradient_accumulation_steps", "3"]).objective.num_learned(3) == 3
    with pytest.raises(LoptError, match="^--local_accumulation_steps 3: a step has --gradient_accumulation_steps 2 "):
        parse_config([*required.split(), "--gradient_accumulation_steps", "2"])


@pytest.mark.parametrize("method", ["frozen", "e2e"])
def test_a_local_objective_needs_local_learning(method: Any) -> None:
    with pytest.raises(LoptError, match=f"^--local_objective next_token needs --method lopt; with --method {method}"):
        ObjectiveConfig(method=method, local_objective="next_token")
    assert ObjectiveConfig(method=method, local_objective="none").local == "none"

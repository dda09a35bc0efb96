"""Every flag of a run says what it affects: a run that resumes, the ranks that must agree, the comparison of runs."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest

from lopt_pp.config.fields import Effects, Resume, effects_of, flag
from lopt_pp.config.train_config import COMPONENTS, EFFECTS, SECRETS, Config

FIELDS = {field.name: field for component in COMPONENTS for field in dataclasses.fields(component)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_declares_all_three(name: str) -> None:
    effects = FIELDS[name].metadata["effects"]
    assert isinstance(effects, Effects)
    assert isinstance(effects.on_resume, Resume)
    assert type(effects.shared_by_ranks) is bool
    assert type(effects.compared) is bool
    assert EFFECTS[name] == effects


def test_the_components_are_those_of_the_config_and_no_two_flags_have_one_name() -> None:
    assert tuple(component.type for component in dataclasses.fields(Config)) == COMPONENTS
    assert EFFECTS.keys() == FIELDS.keys()
    assert len(FIELDS) == sum(len(dataclasses.fields(component)) for component in COMPONENTS)


@pytest.mark.parametrize("forgotten", ["on_resume", "shared_by_ranks", "compared"])
def test_a_flag_that_forgets_one_cannot_be_defined(forgotten: str) -> None:
    said: dict[str, Any] = {"on_resume": Resume.NO_EFFECT, "shared_by_ranks": True, "compared": True}
    assert flag("A flag.", **said)["help"] == "A flag."
    del said[forgotten]
    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{forgotten}'"):
        flag("A flag.", **said)


def test_a_field_that_says_nothing_is_no_flag_of_a_run() -> None:
    @dataclass(frozen=True)
    class Forgetful:
        said: int = field(
            default=1, metadata=flag("A flag.", on_resume=Resume.NO_EFFECT, shared_by_ranks=True, compared=True)
        )
        unsaid: int = field(default=2, metadata={"help": "A flag."})

    with pytest.raises(TypeError, match="^Forgetful.unsaid does not say what it affects"):
        effects_of(Forgetful)


def test_flags_are_chosen_by_what_they_affect() -> None:
    config = Config(*(component(**{n: f"a-{n}" for n in _needed(component)}) for component in COMPONENTS))
    assert config.flags().keys() == EFFECTS.keys() - SECRETS and {"hub_token"} == SECRETS
    chosen = config.flags(lambda effects: effects.on_resume is Resume.MUST_MATCH)
    assert chosen["seed"] == 42 and "learning_rate" not in chosen
    assert chosen.keys() == {name for name, effects in EFFECTS.items() if effects.on_resume is Resume.MUST_MATCH}


def _needed(component: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(component) if field.default is dataclasses.MISSING]
    return [*names, "dataset_name"] if "dataset_name" in component.__dataclass_fields__ else names

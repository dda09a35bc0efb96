"""The optimizers that `--optim` names: made as transformers makes them, and resumed to the bit."""

import importlib.util
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lopt_pp.config import optimizer_names
from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.optimizer_names import Optim, check_optimizer_installed
from lopt_pp.errors import LoptError
from lopt_pp.stage.optimizer import Optimizer, check_optimizer
from lopt_pp.stage.optimizer_kinds import ParameterFacts, Together
from lopt_pp.stage.state import read_state, write_state

NAMES: tuple[Any, ...] = get_args(Optim)
SETTINGS = {"sgd": "momentum=0.9,nesterov=true", "rmsprop": "momentum=0.5"}


def config_of(name: Any, **changes: Any) -> OptimConfig:
    package = optimizer_names.optimizer_kind(name).package
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    return OptimConfig(optim=name, **{"optim_args": SETTINGS.get(name), "weight_decay": 0.1} | changes)


class Net(nn.Module):
    """A table, a matrix that is large enough for 8 bits, a vector and matrices of experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 64)
        self.up = nn.Linear(64, 80)
        self.experts = nn.Parameter(torch.randn(2, 8, 8))


def make(config: OptimConfig) -> tuple[dict[str, nn.Module], Optimizer]:
    modules: dict[str, nn.Module] = {"block": Net()}
    facts = ParameterFacts.of(modules)
    return modules, Optimizer(modules["block"].parameters(), config, 1e-2, num_steps=10, facts=facts)


def train(optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMES)
def test_it_goes_on_to_the_bit(name: Any) -> None:
    config = config_of(name, warmup_steps=2)
    modules, optimizer = make(config)
    before = {key: value.clone() for key, value in modules["block"].state_dict().items()}
    train(optimizer, range(3))
    state = read_state(modules, optimizer)
    again, resumed = make(config)
    write_state(state, again, resumed, 3)
    for each in (optimizer, resumed):
        train(each, range(3, 6))
    ends, expected = read_state(again, resumed), read_state(modules, optimizer)
    assert ends.keys() == expected.keys() and all(torch.equal(ends[key], expected[key]) for key in ends)
    assert not any(torch.equal(value, before[key]) for key, value in modules["block"].state_dict().items())
    lost = next(key for key in state if key.endswith(".block.up.weight") and not key.startswith(("group_", "train_")))
    if name.startswith(("adamw_torch", "schedule_free_adamw")):  # Others have no second such matrix.
        del state[lost]
        with pytest.raises(LoptError, match="has no tensor"):
            write_state(state, *make(config), 3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "muon"])
def test_it_is_made_as_transformers_makes_it(name: Any, tmp_path: Path) -> None:
    config = config_of(name, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3, warmup_steps=3)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        optim=name,
        optim_args=config.optim_args,
        learning_rate=1e-2,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-3,
        warmup_steps=3,
        use_cpu=True,
    )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    theirs = kind([nn.Parameter(torch.zeros(2, 2))], **settings)
    ours = make(config)[1].inner
    assert type(ours) is kind
    of_groups = {"weight_decay": 0, "fused": name == "adamw_torch_fused"}  # There None is false.
    assert ours.defaults | of_groups == theirs.defaults | of_groups
    if name in ("rmsprop", "sgd"):
        assert ours.defaults["momentum"] > 0


def test_muon_is_for_the_matrices_of_layers() -> None:
    modules, optimizer = make(config_of("muon"))
    assert isinstance(optimizer.inner, Together)
    muon, adamw = optimizer.inner.parts
    assert [group["param_names"] for group in muon.param_groups] == [["block.up.weight"]]
    names = [name for group in adamw.param_groups for name in group["param_names"]]
    assert sorted(names) == ["block.experts", "block.table.weight", "block.up.bias"]
    assert muon.defaults["adjust_lr_fn"] == "match_rms_adamw"
    train(optimizer, range(1))
    # The update of a matrix has the size that AdamW's has.
    up = modules["block"].get_parameter("up.weight")
    assert (up - Net().up.weight * (1 - 1e-2 * 0.1)).square().mean().sqrt().item() == pytest.approx(0.2e-2, rel=0.3)
    assert optimizer.learning_rate == pytest.approx(0.9e-2)
    assert [group["lr"] for group in adamw.param_groups] == [optimizer.learning_rate] * 2


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"])
def test_schedule_free_evaluates_and_saves_averages_and_trains_on_as_before(name: Any) -> None:
    modules, optimizer = make(config_of(name, lr_scheduler_type="constant"))
    train(optimizer, range(8))
    trained = {key: value.clone() for key, value in modules["block"].state_dict().items()}
    saved = read_state(modules, optimizer)
    with optimizer.evaluating():
        averages = {key: value.clone() for key, value in modules["block"].state_dict().items()}
        within = read_state(modules, optimizer)
    for key, value in modules["block"].state_dict().items():
        assert torch.equal(value, trained[key]) and not torch.equal(averages[key], value)
        assert torch.equal(saved[f"block.{key}"], averages[key])
        assert torch.equal(saved[f"train_weights.block.{key}"], value)
    assert all(torch.equal(within[key], value) for key, value in saved.items())
    # The library's own way.
    optimizer.inner.eval()  # type: ignore[attr-defined]
    assert all(torch.equal(value, averages[key]) for key, value in modules["block"].state_dict().items())


def test_a_factory_makes_it_of_named_groups() -> None:
    modules: dict[str, nn.Module] = {"block": Net()}
    seen: list[dict[str, Any]] = []

    def factory(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.extend(groups)
        return torch.optim.NAdam(groups, momentum_decay=1e-3)

    parameters = modules["block"].parameters()
    facts = ParameterFacts.of(modules)
    optimizer = Optimizer(parameters, OptimConfig(), 1e-2, num_steps=10, facts=facts, factory=factory)
    assert [(group["owner"], group["lr"]) for group in seen] == [("block", 1e-2)] * 2
    assert seen[1]["param_names"] == ["block.up.bias"]
    train(optimizer, range(2))
    assert "mu_product.block.up.bias" in read_state(modules, optimizer)


def test_a_package_that_is_missing_is_named_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("adamw_8bit", "bitsandbytes"), ("schedule_free_adamw", "schedulefree")):
        with pytest.raises(LoptError, match=f"^--optim {name} needs the package {package}: pip install {package}$"):
            check_optimizer(OptimConfig(optim=name))  # type: ignore[arg-type]
    check_optimizer_installed("adafactor")


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("adamw_torch", "amsgrad", "give key=value"),
        ("adamw_torch", "lr=1", "give --learning_rate"),
        ("sgd", "weight_decay=1", "give --weight_decay"),
        ("sgd", "spin=1", "--optim_args spin=1 with --optim sgd: .*spin"),
        ("sgd", "nesterov=true", "--optim_args nesterov=true with --optim sgd: Nesterov"),
    ],
)
def test_settings_that_do_not_fit(name: Any, given: str, expected: str) -> None:
    with pytest.raises(LoptError, match=expected):
        check_optimizer(OptimConfig(optim=name, optim_args=given))

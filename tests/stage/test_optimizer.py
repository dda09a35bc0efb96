"""Learning rates, their schedule, weight decay and clipping of one stage."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from transformers import SchedulerType, get_scheduler

from lopt_pp.config.optim import OptimConfig
from lopt_pp.errors import LoptError
from lopt_pp.stage.optimizer import Optimizer, check_optimizer

STEPS = 10
PEAK = 1e-3

WORKING = [
    SchedulerType.LINEAR,
    SchedulerType.COSINE,
    SchedulerType.COSINE_WITH_RESTARTS,
    SchedulerType.POLYNOMIAL,
    SchedulerType.CONSTANT,
    SchedulerType.CONSTANT_WITH_WARMUP,
    SchedulerType.INVERSE_SQRT,
]
NEEDING_SETTINGS = ["cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"]


def make_parameters() -> list[nn.Parameter]:
    """A matrix and a vector, with a gradient."""
    parameters = [nn.Parameter(torch.full(shape, 2.0)) for shape in ((3, 4), (5,))]
    for parameter in parameters:
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    return parameters


def rates(config: OptimConfig) -> list[float]:
    """The learning rate of each step of a run."""
    parameters = make_parameters()
    optimizer = Optimizer(parameters, config, PEAK, STEPS)
    seen = []
    for _ in range(STEPS):
        seen.append(optimizer.learning_rate)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return seen


def rates_of_transformers(kind: SchedulerType, warmup: int, settings: dict[str, Any] | None = None) -> list[float]:
    adamw = torch.optim.AdamW(make_parameters(), lr=PEAK)
    schedule = get_scheduler(kind, adamw, warmup, STEPS, settings)
    seen = []
    for _ in range(STEPS):
        seen.append(schedule.get_last_lr()[0])
        adamw.step()
        schedule.step()
    return seen


def test_earlier_stages_learn_at_their_objectives_share_by_default() -> None:
    config = OptimConfig(learning_rate=3e-4)
    assert config.rates_of_earlier_stage(0.1) == pytest.approx((3e-5, 3e-5))
    assert config.rates_of_earlier_stage(1.0) == (3e-4, 3e-4)


@pytest.mark.parametrize("rate", [3e-4, 0.0])
def test_local_rates_as_given(rate: float) -> None:
    config = OptimConfig(learning_rate=3e-4, local_learning_rate=rate)
    assert config.rates_of_earlier_stage(0.1) == (rate, rate)
    config = OptimConfig(learning_rate=3e-4, local_head_learning_rate=rate)
    assert config.rates_of_earlier_stage(1.0) == (3e-4, rate)
    config = OptimConfig(learning_rate=3e-4, local_learning_rate=1e-5, local_head_learning_rate=rate)
    assert config.rates_of_earlier_stage(1.0) == (1e-5, rate)


def test_a_head_has_a_rate_of_its_own_on_the_same_schedule() -> None:
    (matrix, vector), (head, _) = make_parameters(), make_parameters()
    optimizer = Optimizer([matrix, vector], OptimConfig(weight_decay=0.5), PEAK, STEPS, [head], 10 * PEAK)
    assert optimizer.learning_rate == PEAK
    for parameter in (matrix, vector, head):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((3, 4), 2.0 * (1 - PEAK * 0.5)))
    torch.testing.assert_close(head.detach(), torch.full((3, 4), 2.0 * (1 - 10 * PEAK * 0.5)))
    assert optimizer.learning_rate == pytest.approx(PEAK * 9 / 10)
    rates = [group["lr"] for group in optimizer.inner.param_groups]
    assert rates == pytest.approx([PEAK * 9 / 10, PEAK * 9 / 10, 10 * PEAK * 9 / 10])


def test_what_has_no_gradient_stands() -> None:
    """A block while its head warms up: no decay, no moments."""
    (matrix, vector), (head, _) = make_parameters(), make_parameters()
    matrix.grad = vector.grad = None
    optimizer = Optimizer([matrix, vector], OptimConfig(weight_decay=0.5), PEAK, STEPS, [head], PEAK)
    assert head.grad is not None
    norm = head.grad.norm()
    assert torch.equal(optimizer.clip(), norm)
    optimizer.step()
    assert torch.equal(matrix, torch.full((3, 4), 2.0)) and torch.equal(vector, torch.full((5,), 2.0))
    assert not optimizer.state_of(matrix) and optimizer.state_of(head)


@pytest.mark.parametrize("kind", WORKING)
def test_schedules_are_those_of_transformers(kind: SchedulerType) -> None:
    assert rates(OptimConfig(lr_scheduler_type=kind.value, warmup_steps=3)) == rates_of_transformers(kind, 3)


@pytest.mark.parametrize("kind", WORKING)
@pytest.mark.parametrize("done", [0, 1, 4, 9])
def test_a_resumed_schedule_goes_on_where_it_stopped(
    kind: SchedulerType, done: int, recwarn: pytest.WarningsRecorder
) -> None:
    config = OptimConfig(lr_scheduler_type=kind.value, warmup_steps=3)
    (matrix, vector), (head, _) = make_parameters(), make_parameters()
    optimizer = Optimizer([matrix, vector], config, PEAK, STEPS, [head], 10 * PEAK)
    optimizer.resume({}, done)
    expected = rates(config)
    for step in range(done, STEPS):
        assert optimizer.learning_rate == expected[step]
        block, decay_free, own = (group["lr"] for group in optimizer.inner.param_groups)
        assert block == decay_free == expected[step] and own == pytest.approx(10 * expected[step])
        optimizer.step()
    assert not recwarn.list


def test_linear_schedule_in_numbers() -> None:
    expected = [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert rates(OptimConfig(warmup_steps=2)) == pytest.approx([PEAK * share for share in expected])


def test_warmup_ratio_counts_a_begun_step_as_transformers_does() -> None:
    assert rates(OptimConfig(warmup_ratio=0.3)) == rates_of_transformers(SchedulerType.LINEAR, 3)
    assert rates(OptimConfig(warmup_ratio=0.21)) == rates_of_transformers(SchedulerType.LINEAR, 3)


def test_warmup_steps_win_over_the_ratio() -> None:
    config = OptimConfig(warmup_ratio=0.9, warmup_steps=2)
    assert rates(config) == rates_of_transformers(SchedulerType.LINEAR, 2)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_an_evaluation_is_refused(kind: str) -> None:
    with pytest.raises(LoptError, match=f"--lr_scheduler_type {kind} follows an evaluation.*last stage.*take another"):
        OptimConfig(lr_scheduler_type=SchedulerType(kind))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", NEEDING_SETTINGS)
def test_a_schedule_that_needs_settings_is_refused_without(kind: str) -> None:
    config = OptimConfig(lr_scheduler_type=SchedulerType(kind))  # type: ignore[arg-type]
    with pytest.raises(LoptError, match=f"--lr_scheduler_type {kind}: .*--lr_scheduler_kwargs gives it settings"):
        check_optimizer(config)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("cosine_with_min_lr", {"min_lr": 3e-4}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 1.5}),
        ("cosine_warmup_with_min_lr", {"min_lr": 3e-4, "warmup_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "1-sqrt"}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
        ("inverse_sqrt", {"timescale": 50}),
        ("cosine", {"num_cycles": 1.0}),
    ],
)
def test_settings_of_schedules_are_those_of_transformers(kind: Any, settings: dict[str, Any]) -> None:
    """Whether they come as a mapping or as JSON. A stage with another rate keeps the same share of it."""
    given: Any = settings
    config = OptimConfig(lr_scheduler_type=kind, warmup_steps=3, lr_scheduler_kwargs=given, learning_rate=PEAK)
    expected = rates_of_transformers(kind, 3, settings)
    assert rates(config) == expected
    text = OptimConfig(lr_scheduler_type=kind, lr_scheduler_kwargs=json.dumps(settings)).lr_scheduler_kwargs
    assert text == config.lr_scheduler_kwargs
    earlier = Optimizer(make_parameters(), config, PEAK / 10, STEPS)
    earlier.resume({}, STEPS - 1)
    assert earlier.learning_rate == pytest.approx(expected[-1] / 10)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("min_lr", "expected JSON"),
        ("[1]", "expected settings by name"),
        (
            '{"cycles": 1}',
            "--lr_scheduler_type cosine with --lr_scheduler_kwargs .*cycles.*unexpected",
        ),
    ],
)
def test_settings_of_schedules_that_do_not_fit(given: str, expected: str) -> None:
    with pytest.raises(LoptError, match=expected):
        check_optimizer(OptimConfig(lr_scheduler_type="cosine", lr_scheduler_kwargs=given))


def test_weight_decay_is_of_matrices_alone() -> None:
    matrix, vector = make_parameters()
    optimizer = Optimizer([matrix, vector], OptimConfig(weight_decay=0.5), PEAK, STEPS)
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((3, 4), 2.0 * (1 - PEAK * 0.5)))
    assert torch.equal(vector, torch.full((5,), 2.0))


def test_adamw_has_the_settings_that_are_given() -> None:
    config = OptimConfig(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-3, weight_decay=0.1)
    ours, theirs = make_parameters(), make_parameters()
    optimizer = Optimizer(ours, config, PEAK, STEPS)
    adamw = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0}],
        lr=PEAK,
        betas=(0.8, 0.95),
        eps=1e-3,
    )
    optimizer.step()
    adamw.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their)
        assert our.grad is None


@pytest.mark.parametrize("bound", [0.25, 100.0])
def test_clipping_is_that_of_torch(bound: float) -> None:
    ours, theirs = make_parameters(), make_parameters()
    norm = Optimizer(ours, OptimConfig(max_grad_norm=bound), PEAK, STEPS).clip()
    expected = nn.utils.clip_grad_norm_(theirs, bound)
    assert torch.equal(norm, expected) and 0.25 < norm < 100
    for our, their in zip(ours, theirs, strict=True):
        assert our.grad is not None and their.grad is not None
        assert torch.equal(our.grad, their.grad)


def test_max_grad_norm_0_is_off() -> None:
    ours, untouched = make_parameters(), make_parameters()
    norm = Optimizer(ours, OptimConfig(max_grad_norm=0.0), PEAK, STEPS).clip()
    gradients = [parameter.grad for parameter in untouched if parameter.grad is not None]
    torch.testing.assert_close(norm, torch.cat([gradient.flatten() for gradient in gradients]).norm())
    for our, gradient in zip(ours, gradients, strict=True):
        assert our.grad is not None and torch.equal(our.grad, gradient)


def test_frozen_parameters_are_left_alone() -> None:
    matrix, vector = make_parameters()
    vector.requires_grad_(False)
    optimizer = Optimizer([matrix, vector], OptimConfig(), PEAK, STEPS)
    optimizer.step()
    assert torch.equal(vector, torch.full((5,), 2.0))
    assert not torch.equal(matrix, torch.full((3, 4), 2.0))


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("learning_rate", -1e-5, "at least 0"),
        ("local_learning_rate", -1e-5, "at least 0"),
        ("local_head_learning_rate", -1e-5, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("adam_epsilon", -1e-8, "at least 0"),
        ("max_grad_norm", -1.0, "at least 0"),
        ("warmup_steps", -1, "at least 0"),
        ("warmup_ratio", 1.0, "at least 0 and below 1"),
        ("adam_beta1", 1.0, "at least 0 and below 1"),
        ("adam_beta2", -0.1, "at least 0 and below 1"),
        ("lr_scheduler_type", "triangle", "not a valid SchedulerType, please select one of"),
        ("learning_rate", "fast", "a number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("max_grad_norm", float("inf"), "a finite number"),
    ],
)
def test_config_values(flag: str, value: float | str, expected: str) -> None:
    with pytest.raises(LoptError, match=f"^--{flag} .*{expected}"):
        OptimConfig(**{flag: value})  # type: ignore[arg-type]

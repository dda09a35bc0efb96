"""Patience is counted as `transformers.EarlyStoppingCallback` counts it."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from lopt_pp.checkpoint.best import Criterion
from lopt_pp.training.early_stopping import EarlyStopping


def ours(values: list[float], patience: int, threshold: float, greater: bool, recorded: int = 0) -> int | None:
    """The evaluation, from 1, after which the run is asked to finish."""
    asked: list[str] = []
    stopping = EarlyStopping(Criterion("eval_loss", greater), patience, threshold, asked.append)
    for number, value in enumerate(values, 1):
        (stopping.remember if number <= recorded else stopping.evaluated)(number, {"eval_loss": value})
        if asked:
            return number
    return None


def theirs(values: list[float], patience: int, threshold: float, greater: bool) -> int | None:
    arguments = cast(TrainingArguments, SimpleNamespace(metric_for_best_model="loss", greater_is_better=greater))
    callback, state, control = EarlyStoppingCallback(patience, threshold), TrainerState(), TrainerControl()
    for number, value in enumerate(values, 1):
        callback.on_evaluate(arguments, state, control, metrics={"eval_loss": value})
        if control.should_training_stop:
            return number
        # What the trainer does after it.
        best = cast(Any, state).best_metric
        if best is None or (value > best if greater else value < best):
            state.best_metric = value
    return None


@given(
    st.lists(st.sampled_from([1.0, 1.5, 2.0, 2.25, 3.0]), max_size=8),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
)
def test_it_asks_when_the_callback_does(values: list[float], patience: int, threshold: float, greater: bool) -> None:
    assert ours(values, patience, threshold, greater) == theirs(values, patience, threshold, greater)


@pytest.mark.parametrize("recorded", range(4))
def test_what_was_measured_before_a_resume_counts_but_asks_for_nothing(recorded: int) -> None:
    assert ours([1.0, 2.0, 2.0, 2.0], 2, 0.0, False, recorded) == max(3, recorded + 1)


def test_the_pretrained_model_does_not_count_and_what_is_not_finite_is_no_better() -> None:
    asked: list[str] = []
    stopping = EarlyStopping(Criterion("eval_accuracy", True), 2, 0.0, asked.append)
    stopping.evaluated(0, {"eval_accuracy": 0.9})
    for step, value in ((10, 0.5), (20, math.inf), (30, math.nan)):
        stopping.evaluated(step, {"eval_accuracy": value})
    assert asked == ["eval_accuracy has not improved for 2 evaluations; the best was 0.5 after step 10"]

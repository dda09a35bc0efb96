"""A function of the user's own that makes metrics is tried before training, and its mistakes are said in a line."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from own_metrics import totals
from transformers import EvalPrediction

from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.data import TokenizedRows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.errors import LoptError
from lopt_pp.training.token_metrics import find_metrics

TOKENS = [[1, 5, 6, 7], [1, 8], [1, 5]]
LABELS = [[-100, -100, 6, 7], [-100, 8], [-100, 5]]


@pytest.fixture
def sets() -> EvaluationSets:
    lengths = [len(row) for row in TOKENS]
    columns = {"input_ids": TOKENS, "labels": LABELS, "length": lengths, "num_targets": [2, 1, 1]}
    return EvaluationSets({"own": TokenizedRows(Dataset.from_dict(columns), "rows", {})})


def test_it_is_tried_on_rows_that_are_predicted_right(sets: EvaluationSets) -> None:
    """Of which the flag names the function, and the names that it returns are known then, without their prefix."""
    seen: list[EvalPrediction] = []

    def note(prediction: EvalPrediction) -> dict[str, Any]:
        seen.append(prediction)
        return {"eval_own_accuracy": np.float32(1), "right": np.array([3])}

    metrics = find_metrics(EvaluationConfig(eval_split_size=3, eval_metrics=["entropy"]), sets, note)
    assert metrics is not None and metrics.all_names == ["entropy", "accuracy", "right"]
    (prediction,) = seen
    assert prediction.predictions.tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]  # type: ignore[union-attr]
    assert prediction.label_ids.tolist() == [LABELS[0], [-100, 8, -100, -100]]  # type: ignore[union-attr]
    flags = EvaluationConfig(eval_split_size=3, compute_metrics="own_metrics:totals")
    named = find_metrics(flags, sets)
    assert named is not None and named.all_names == ["right", "order", "focal_loss"]
    assert find_metrics(EvaluationConfig(), sets) is None and find_metrics(flags, None) is None
    assert totals(prediction)["right"] == 3


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (
            lambda prediction: 1 / 0,
            "^compute_metrics, tried on .*, fails: ZeroDivisionError: .* \\(test_token_metrics.py, line \\d+\\)$",
        ),
        (lambda prediction: None, "^compute_metrics, tried on .*, returns None; let it return a dict of numbers"),
        (lambda prediction: {}, "^compute_metrics, tried on .*, returns .*; let it return a dict of numbers by name$"),
        (lambda prediction: {"a": "b"}, "returns 'b' for 'a'; let it return a number for each name$"),
        (lambda prediction: {"a": np.zeros(2)}, "for 'a'; let it return a number for each name$"),
        (lambda prediction: {"eval_own_loss": 1.0}, "^compute_metrics returns loss, which is measured anyway; call it"),
        (lambda prediction: {"entropy": 1.0}, "^compute_metrics returns entropy, which is measured anyway; call it"),
    ],
)
def test_mistakes_are_named(sets: EvaluationSets, function: Callable[[Any], Any], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        find_metrics(EvaluationConfig(eval_split_size=3, eval_metrics=["entropy"]), sets, function)


def test_names_that_change_are_told_of_once(sets: EvaluationSets, caplog: pytest.LogCaptureFixture) -> None:
    metrics = find_metrics(EvaluationConfig(eval_split_size=3), sets, lambda prediction: {"a": 1, "b": 2})
    assert metrics is not None
    metrics.check_names({"b": 1.0, "a": 2.0})
    assert not caplog.text
    for _ in range(2):
        metrics.check_names({"a": 1.0, "c": 2.0})
    assert caplog.text.count("compute_metrics returns no b and also c, other than when it was tried before") == 1
    with pytest.raises(LoptError, match="^compute_metrics returns perplexity, which is measured anyway"):
        metrics.check_names({"a": 1.0, "perplexity": 2.0})


def test_flags_that_name_nothing(sets: EvaluationSets) -> None:
    with pytest.raises(LoptError, match="^--compute_metrics own_metrics:nothing: own_metrics has no nothing$"):
        find_metrics(EvaluationConfig(eval_split_size=3, compute_metrics="own_metrics:nothing"), sets)
    with pytest.raises(LoptError, match="^--eval_metrics bleu: give mean_token_accuracy or entropy, or both$"):
        EvaluationConfig(eval_split_size=3, eval_metrics=["bleu"])
    with pytest.raises(LoptError, match="^--compute_metrics needs rows to evaluate on: give --eval_file, "):
        EvaluationConfig(compute_metrics="own_metrics:totals")

"""The metrics that a function of the user's own makes of an evaluation."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from lopt_pp.errors import LoptError, shown
from lopt_pp.util.user_code import describe, place_of

ComputeMetrics = Callable[[EvalPrediction], Mapping[str, Any]]
"""As for `transformers.Trainer`: makes metrics, by name, of the predictions of all rows of a set.

`predictions`, int64 [rows, tokens], has the likeliest token after each, as the argmax of logits would; `label_ids`,
int64 [rows, tokens], the labels. So `predictions[:, :-1]` are of `label_ids[:, 1:]`. `losses`, float32 [rows, tokens],
has the loss of the next token. Where the next token is not a target, a prediction is -100 and a loss 0.
"""


def computed_by(compute: ComputeMetrics, called: str, prediction: EvalPrediction, prefix: str) -> dict[str, float]:
    """What the user's function returns, by name.

    Args:
        compute: it.
        called: what messages call it.
        prediction: that it is given.
        prefix: of the set's names, which those of the function may have or not; they lose it.

    Raises:
        LoptError: it fails, or does not return numbers by name.
    """
    try:
        values = compute(prediction)
    except Exception as error:  # Whatever the user's code may raise.
        raise LoptError(f"{called} fails: {describe(error)}{place_of(error)}") from error
    if not isinstance(values, Mapping) or not values:
        raise LoptError(f"{called} returns {shown(values)}; let it return a dict of numbers by name")
    found = {}
    for name, value in values.items():
        number = value.item() if isinstance(value, np.generic | np.ndarray | torch.Tensor) and _is_one(value) else value
        if not isinstance(name, str) or not isinstance(number, Real):
            raise LoptError(f"{called} returns {shown(value)} for {shown(name)}; let it return a number for each name")
        found[name.removeprefix(prefix)] = float(number)
    return found


def _is_one(value: Any) -> bool:
    return math.prod(value.shape) == 1

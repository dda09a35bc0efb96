"""Where a model is cut."""

import pytest

from lopt_pp.errors import LoptError
from lopt_pp.model.partition import split_at, split_evenly


def test_midpoint() -> None:
    assert [(spec.start, spec.stop) for spec in split_evenly(30, 2)] == [(0, 15), (15, 30)]
    assert [(spec.start, spec.stop) for spec in split_evenly(7, 2)] == [(0, 3), (3, 7)]


def test_fewer_layers_than_stages() -> None:
    with pytest.raises(LoptError, match="--num_stages 5 is more than the model's 4 layers"):
        split_evenly(4, 5)


def test_boundaries_must_ascend() -> None:
    with pytest.raises(LoptError, match="^--split 3,3: layer numbers that ascend, from 1 to 5; the model has 6"):
        split_at([3, 3], 6)

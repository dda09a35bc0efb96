"""Which rows share a row."""

import numpy as np
import pytest

from lopt_pp.data.packing import pack


def test_best_fit_decreasing() -> None:
    packs = [sorted(numbers.tolist()) for numbers in pack(np.array([5, 3, 4, 2, 6, 7]), 8)]
    assert sorted(packs) == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize("number", [1, 7, 1000, 2500])
def test_every_row_once_and_none_too_long(number: int) -> None:
    lengths = np.random.default_rng(number).integers(1, 65, number)
    packs = pack(lengths, 64)
    assert sorted(np.concatenate(packs).tolist()) == list(range(number))
    assert max(lengths[numbers].sum() for numbers in packs) <= 64
    if number >= 1000:
        filled = lengths.sum() / (64 * len(packs))
        assert filled > 0.95


def test_no_rows() -> None:
    assert pack(np.array([], dtype=np.int64), 8) == []

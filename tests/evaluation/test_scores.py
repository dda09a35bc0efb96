"""Scores and how they differ: standard errors, and a table with gaps."""

import numpy as np
import pytest

from lopt_pp.evaluation.scores import Measure, Score, as_data, change, table

LOSS = Measure("general", "text", "loss", False)
ACCURACY = Measure("task", "sums", "acc", True)
OTHER = Measure("general", "odd", "score", None)


def test_a_mean_of_items_of_one_weight_has_the_usual_standard_error() -> None:
    items = np.array([0.0, 1.0, 1.0, 4.0])
    score = Score.of_items(items, np.ones(4))
    assert (score.value, score.stderr) == (1.5, pytest.approx(items.std(ddof=1) / 2))
    assert Score.of_items(items[:1], np.ones(1)).stderr is None


def test_items_weigh_what_they_count() -> None:
    """Ten tokens of 1 nat and two of 4 are 1.5 nats a token."""
    assert Score.of_items(np.array([10.0, 8.0]), np.array([10.0, 2.0])).value == 1.5


def test_a_change_on_the_same_items_is_surer_than_the_scores() -> None:
    hard = np.array([1.0, 9.0, 3.0, 20.0])
    before, after = Score.of_items(hard, np.ones(4)), Score.of_items(hard + [1.0, 1.0, 1.5, 0.5], np.ones(4))
    difference = change(before, after)
    assert difference.value == 1.0
    assert difference.stderr == pytest.approx(np.std([1.0, 1.0, 1.5, 0.5], ddof=1) / 2)
    assert before.stderr is not None and difference.stderr is not None and difference.stderr < before.stderr / 10


def test_other_items_are_taken_as_independent() -> None:
    assert change(Score(1.0, 0.3), Score(0.5, 0.4)) == Score(-0.5, 0.5)
    first, second = Score.of_items(np.array([1.0, 2.0]), np.ones(2)), Score.of_items(np.arange(3.0), np.ones(3))
    assert first.stderr is not None and second.stderr is not None
    assert change(first, second).stderr == pytest.approx(np.hypot(first.stderr, second.stderr))
    assert change(Score(1.0), Score(0.5, 0.4)).stderr is None


def test_the_table_has_the_task_first_and_bears_gaps() -> None:
    before = {LOSS: Score(2.0, 0.1), ACCURACY: Score(0.25, 0.05)}
    after = {LOSS: Score(2.5, 0.1), ACCURACY: Score(0.5, 0.12), OTHER: Score(12345.678)}
    lines = [" ".join(line.split()) for line in table([("new", after)], ("old", before)).splitlines()]
    assert lines[0] == "| | | | before: old | after: new | change |" and set(lines[1]) == set("| -")
    assert lines[2:] == [
        "| task | sums | acc ↑ | 0.2500 ± 0.0500 | 0.5000 ± 0.1200 | +0.2500 ± 0.1300 |",
        "| general | text | loss ↓ | 2.0000 ± 0.1000 | 2.5000 ± 0.1000 | +0.5000 ± 0.1414 |",
        "| general | odd | score | | 12346 | |",
    ]
    rows = as_data([("new", after)], ("old", before))
    assert rows[0]["models"] == [
        {"model": "new", "value": 0.5, "stderr": 0.12, "change": 0.25, "change_stderr": pytest.approx(0.13)}
    ]
    assert "before" not in rows[2] and "change" not in rows[2]["models"][0]

"""What models score on the task that was learned and on what they could do before, in one table."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Measure:
    """Something that models are measured by.

    Attributes:
        kind: `task` for what was trained on, `general` for what is to be kept.
        name: of the benchmark, or of the file.
        metric: the number's name.
        higher_is_better: None where that is not known.
    """

    kind: Literal["task", "general"]
    name: str
    metric: str
    higher_is_better: bool | None


@dataclass(frozen=True)
class Score:
    """What a model scores by a measure.

    Attributes:
        value: over all items.
        stderr: the value's standard error; None where it is not known.
        items: float64 `[items]`, what each adds to the value's numerator; None where the value is not such a mean.
        weights: float64 `[items]`, what each adds to its denominator.
    """

    value: float
    stderr: float | None = None
    items: np.ndarray | None = None
    weights: np.ndarray | None = None

    @classmethod
    def of_items(cls, items: np.ndarray, weights: np.ndarray) -> "Score":
        """The mean `sum(items) / sum(weights)`, with the standard error of a ratio of sums over independent items."""
        value = float(items.sum() / weights.sum())
        number = len(items)
        stderr = None
        if number > 1:
            squares = np.square(items - value * weights).sum() * number / (number - 1)
            stderr = math.sqrt(squares) / float(weights.sum())
        return cls(value, stderr, items, weights)


Scores = Mapping[Measure, Score]


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats; infinite where float64 ends."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else loss * math.inf


def change(before: Score, after: Score) -> Score:
    """By how much a model's score differs from another's.

    Where both have seen the same items, the standard error is that of the items' differences: what makes an item hard
    for both counts in neither. Otherwise the scores are taken as independent, which makes it larger.
    """
    if before.items is not None and after.items is not None:
        assert before.weights is not None and after.weights is not None
        if np.array_equal(before.weights, after.weights):
            return Score.of_items(after.items - before.items, after.weights)
    stderr = None
    if before.stderr is not None and after.stderr is not None:
        stderr = math.hypot(before.stderr, after.stderr)
    return Score(after.value - before.value, stderr)


def table(models: Sequence[tuple[str, Scores]], before: tuple[str, Scores] | None) -> str:
    """The table for a terminal or a Markdown file: a line for each measure, the task's first.

    Args:
        models: name and scores of each.
        before: the same of the model that they are compared with; None where there is none.
    """
    heads = ["", "", ""]
    if before is not None:
        heads.append(f"before: {before[0]}")
    for name, _ in models:
        heads += [f"after: {name}", "change"] if before is not None else [name]
    lines = [heads]
    for measure in measures([scores for _, scores in models]):
        arrow = {True: " ↑", False: " ↓", None: ""}[measure.higher_is_better]
        line = [measure.kind, measure.name, measure.metric + arrow]
        old = before[1].get(measure) if before is not None else None
        if before is not None:
            line.append(_shown(old))
        for _, scores in models:
            new = scores.get(measure)
            line.append(_shown(new))
            if before is not None:
                line.append(_shown(change(old, new), signed=True) if old is not None and new is not None else "")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def as_data(models: Sequence[tuple[str, Scores]], before: tuple[str, Scores] | None) -> list[dict[str, Any]]:
    """The table as plain data for a file: a dict for each measure."""
    rows = []
    for measure in measures([scores for _, scores in models]):
        row: dict[str, Any] = dict(vars(measure))
        old = before[1].get(measure) if before is not None else None
        if before is not None and old is not None:
            row["before"] = {"model": before[0], "value": old.value, "stderr": old.stderr}
        row["models"] = []
        for name, scores in models:
            if (new := scores.get(measure)) is None:
                continue
            cell = {"model": name, "value": new.value, "stderr": new.stderr}
            if old is not None:
                difference = change(old, new)
                cell |= {"change": difference.value, "change_stderr": difference.stderr}
            row["models"].append(cell)
        rows.append(row)
    return rows


def measures(scores: Sequence[Scores]) -> list[Measure]:
    """What there are scores of, as they come, the task's first."""
    found = list(dict.fromkeys(measure for own in scores for measure in own))
    return sorted(found, key=lambda measure: measure.kind == "general")


def _shown(score: Score | None, signed: bool = False) -> str:
    if score is None:
        return ""
    value = _number(score.value)
    if signed and not value.startswith("-"):
        value = f"+{value}"
    return value if score.stderr is None else f"{value} ± {_number(score.stderr)}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.5g}"

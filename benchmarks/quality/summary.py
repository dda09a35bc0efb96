"""The comparison as a table, as JSON and as a plot, from the results of its trials."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from methods import METHODS, UNTOUCHED, Trial

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Results = Mapping[Trial, Mapping[str, Any]]
Setting = tuple[str, float, float | None]
"""Method, learning rate, and the earlier blocks' share of it."""

GiB = 2**30


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: of them.
        deviation: sample standard deviation; None of a single one.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def shown(self, digits: int) -> str:
        """As in the table."""
        own = f"{self.mean:.{digits}f}"
        return own if self.deviation is None else f"{own} ± {self.deviation:.{digits}f}"


COLUMNS: dict[str, tuple[str, int]] = {
    "test_loss": ("answer loss ↓", 3),
    "accuracy": ("exact match ↑", 3),
    "general_perplexity": ("general perplexity ↓", 2),
    "general_kl": ("general KL ↓", 4),
    "instructions_perplexity": ("instruction perplexity ↓", 2),
    "instructions_kl": ("instruction KL ↓", 4),
    "drift_norm": ("drift", 3),
}
"""Of the table: what each figure is called, and its digits."""


def best_settings(results: Results, steps: int) -> dict[str, Setting]:
    """Of each method, the learning rates with the lowest loss on the validation rows.

    Args:
        results: of the grid, one seed.
        steps: of its trials.
    """
    best: dict[str, Trial] = {}
    for trial, result in sorted(results.items(), key=lambda item: _place(item[0])):
        loss = result["validation_loss"]
        if trial.steps != steps or not math.isfinite(loss):
            continue
        if trial.method not in best or loss < results[best[trial.method]]["validation_loss"]:
            best[trial.method] = trial
    return {method: trial.setting for method, trial in best.items()}


def over_seeds(results: Results, setting: Setting, steps: int) -> dict[str, Spread]:
    """Mean and spread of each figure over the seeds of one setting."""
    own = [result for trial, result in results.items() if trial.setting == setting and trial.steps == steps]
    return {name: Spread.of([_value(result, name) for result in own]) for name in COLUMNS if _has(own, name)}


def _has(results: Sequence[Mapping[str, Any]], name: str) -> bool:
    return bool(results) and all(name in result for result in results)


def _value(result: Mapping[str, Any], name: str) -> float:
    own = result[name]
    return own["value"] if isinstance(own, Mapping) else own


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        method: its name.
        setting: the chosen learning rates; None of the untouched model.
        steps: of training.
        seeds: so many of them.
        figures: by the names of `COLUMNS`.
    """

    method: str
    setting: Setting | None
    steps: int
    seeds: int
    figures: Mapping[str, Spread]


def untouched_line(result: Mapping[str, Any]) -> Line:
    figures = {name: Spread(_value(result, name), None) for name in COLUMNS if name in result}
    return Line(UNTOUCHED, None, 0, 1, figures)


def lines_of(results: Results, best: Mapping[str, Setting], steps: Mapping[str, int]) -> list[Line]:
    """A line for each method at its best learning rates.

    Args:
        results: of all trials.
        best: of `best_settings`.
        steps: of each method.
    """
    lines = []
    for method, setting in best.items():
        seeds = sum(trial.setting == setting and trial.steps == steps[method] for trial in results)
        if seeds:
            lines.append(Line(method, setting, steps[method], seeds, over_seeds(results, setting, steps[method])))
    return lines


def table(lines: Sequence[Line]) -> str:
    """As markdown."""
    names = [name for name in COLUMNS if any(name in line.figures for line in lines)]
    heads = ["method", "rate", "earlier blocks' rate", "steps", "seeds", *(COLUMNS[name][0] for name in names)]
    rows = [heads, ["---"] * len(heads)]
    for line in lines:
        rate, local = "", ""
        if line.setting is not None:
            _, rate_value, share = line.setting
            rate, local = f"{rate_value:g}", "" if share is None else f"{share * rate_value:g}"
        cells = [line.figures[name].shown(COLUMNS[name][1]) if name in line.figures else "" for name in names]
        rows.append([line.method, rate, local, str(line.steps), str(line.seeds), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def speed_table(speeds: Mapping[str, Mapping[str, Any]]) -> str:
    """As markdown: what a step of each method costs."""
    rows = [["method", "s per step", "tokens/s", "peak GiB of each stage", "trained parameters, millions"], ["---"] * 5]
    for method, speed in speeds.items():
        peaks = " + ".join(f"{peak / GiB:.2f}" for peak in speed["peak_memory_bytes"])
        trained = f"{speed['trained_parameters'] / 1e6:.1f}"
        rows.append([method, f"{speed['step_seconds']:.2f}", f"{speed['tokens_per_second']:.0f}", peaks, trained])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def grid_table(results: Results, steps: int, seed: int) -> str:
    """As markdown: every setting of the grid, with what it was chosen by and what it cost."""
    rows = [
        [
            "method",
            "rate",
            "earlier blocks' rate",
            "validation loss",
            "answer loss",
            "exact match",
            "general KL",
            "drift",
        ]
    ]
    rows.append(["---"] * len(rows[0]))
    for trial, result in sorted(results.items(), key=lambda item: _place(item[0])):
        if trial.steps != steps or trial.seed != seed:
            continue
        local = "" if trial.local_share is None else f"{trial.local_share * trial.learning_rate:g}"
        figures = [f"{result['validation_loss']:.3f}", f"{_value(result, 'test_loss'):.3f}"]
        figures.append(f"{_value(result, 'accuracy'):.3f}" if "accuracy" in result else "")
        figures += [f"{_value(result, 'general_kl'):.4f}"]
        figures.append(f"{result['drift_norm']:.3f}" if "drift_norm" in result else "")
        rows.append([trial.method, f"{trial.learning_rate:g}", local, *figures])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _place(trial: Trial) -> tuple[int, float, float]:
    """Where a trial stands in a table, whenever it was run."""
    return list(METHODS).index(trial.method), trial.learning_rate, -(trial.local_share or 0.0)


def closed(lines: Sequence[Line], method: str) -> float | None:
    """The share of the distance in answer loss from `frozen` to `e2e` that a method closes; None without all three."""
    losses = {line.method: line.figures["test_loss"].mean for line in lines}
    if not {"frozen", "e2e", method} <= losses.keys() or losses["frozen"] == losses["e2e"]:
        return None
    return (losses["frozen"] - losses[method]) / (losses["frozen"] - losses["e2e"])


def plot(path: Path, results: Results, untouched: Mapping[str, Any], steps: int, seed: int) -> None:
    """Task gain against forgetting: a curve for each method over its learning rates, further up and left is better.

    Args:
        path: of the picture.
        results: of the grid.
        untouched: of the model as it is.
        steps, seed: of the grid's trials.
    """
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    start = _value(untouched, "test_loss")
    for color, method in enumerate(METHODS):
        for share, style in zip(METHODS[method].local_shares, ("-", "--"), strict=False):
            points = sorted(
                (trial.learning_rate, _value(result, "general_kl"), start - _value(result, "test_loss"))
                for trial, result in results.items()
                if (trial.method, trial.local_share, trial.steps, trial.seed) == (method, share, steps, seed)
            )
            if not points:
                continue
            label = method if share is None else f"{method}, earlier blocks at {share:g} of the rate"
            rates, forgetting, gain = zip(*points, strict=True)
            axes.plot(forgetting, gain, style, marker="o", color=f"C{color}", label=label)
            for rate, kl, gained in points:
                axes.annotate(f"{rate:g}", (kl, gained), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xscale("symlog", linthresh=1e-3)
    axes.set_xlabel("forgetting: mean KL of the untouched model's next-token distribution on general text (nats)")
    axes.set_ylabel("task gain: fall of the answer loss on test questions (nats)")
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""What is chosen and shown of the results of trials: the best rates, means over seeds, tables."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.methods import METHODS, UNTOUCHED, Setting, Trial

Results = Mapping[Trial, Mapping[str, Any]]

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


BENCHMARK = "benchmark "
"""Before the names of figures of lm-evaluation-harness."""


def columns_of(results: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, int]]:
    """`COLUMNS`, and those of the benchmarks that were run."""
    names = {name for result in results for name in result if name.startswith(BENCHMARK)}
    return COLUMNS | {name: (name.removeprefix(BENCHMARK), 3) for name in sorted(names)}


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
    return {
        name: Spread.of([value_of(result, name) for result in own])
        for name in columns_of(own)
        if own and all(name in result for result in own)
    }


def value_of(result: Mapping[str, Any], name: str) -> float:
    """A figure of a trial, with or without its standard error beside it."""
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
        figures: by the names of `columns_of`.
    """

    method: str
    setting: Setting | None
    steps: int
    seeds: int
    figures: Mapping[str, Spread]


def untouched_line(result: Mapping[str, Any]) -> Line:
    figures = {name: Spread(value_of(result, name), None) for name in columns_of([result]) if name in result}
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
    columns = columns_of(line.figures for line in lines)
    names = [name for name in columns if any(name in line.figures for line in lines)]
    heads = ["method", "rate", "earlier blocks' rate", "steps", "seeds", *(columns[name][0] for name in names)]
    rows = []
    for line in lines:
        rates = ["", ""] if line.setting is None else _rates(line.setting)
        cells = [line.figures[name].shown(columns[name][1]) if name in line.figures else "" for name in names]
        rows.append([line.method, *rates, str(line.steps), str(line.seeds), *cells])
    return _markdown(heads, rows)


def speed_table(speeds: Mapping[str, Mapping[str, Any]]) -> str:
    """As markdown: what a step of each method costs."""
    rows = []
    for method, speed in speeds.items():
        peaks = " + ".join(f"{peak / GiB:.2f}" for peak in speed["peak_memory_bytes"])
        trained = f"{speed['trained_parameters'] / 1e6:.1f}"
        rows.append([method, f"{speed['step_seconds']:.2f}", f"{speed['tokens_per_second']:.0f}", peaks, trained])
    return _markdown(
        ["method", "s per step", "tokens/s", "peak GiB of each stage", "trained parameters, millions"], rows
    )


def grid_table(results: Results, steps: int, seed: int) -> str:
    """As markdown: every setting of the grid, with what it was chosen by and what it cost."""
    names = ["test_loss", "accuracy", "general_kl", "drift_norm"]
    rows = []
    for trial, result in sorted(results.items(), key=lambda item: _place(item[0])):
        if (trial.steps, trial.seed) != (steps, seed):
            continue
        cells = [f"{value_of(result, name):.{COLUMNS[name][1]}f}" if name in result else "" for name in names]
        rows.append([trial.method, *_rates(trial.setting), f"{result['validation_loss']:.3f}", *cells])
    heads = ["method", "rate", "earlier blocks' rate", "validation loss", *(COLUMNS[name][0] for name in names)]
    return _markdown(heads, rows)


def _rates(setting: Setting) -> list[str]:
    _, rate, share = setting
    return [f"{rate:g}", "" if share is None else f"{share * rate:g}"]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def _place(trial: Trial) -> tuple[int, float, float]:
    """Where a trial is in a table, whenever it was run."""
    return list(METHODS).index(trial.method), trial.learning_rate, -(trial.local_share or 0.0)


def closed(lines: Sequence[Line], method: str) -> float | None:
    """The share of the distance in answer loss from `frozen` to `e2e` that a method closes; None without all three."""
    losses = {line.method: line.figures["test_loss"].mean for line in lines}
    if not {"frozen", "e2e", method} <= losses.keys() or losses["frozen"] == losses["e2e"]:
        return None
    return (losses["frozen"] - losses[method]) / (losses["frozen"] - losses["e2e"])

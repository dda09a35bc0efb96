"""Task gain against forgetting, as a picture."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.quality.methods import METHODS
from benchmarks.quality.summary import Results, value_of

matplotlib.use("Agg")  # There may be no screen.
import matplotlib.pyplot as plt


def plot(path: Path, results: Results, untouched: Mapping[str, Any], steps: int, seed: int) -> None:
    """Draws a curve for each method over its learning rates; further up and left is better.

    Args:
        path: of the picture.
        results: of the grid.
        untouched: of the model as it is.
        steps, seed: of the grid's trials.
    """
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    start = value_of(untouched, "test_loss")
    for color, method in enumerate(METHODS.values()):
        rate_shares = sorted(
            {trial.local_share for trial in results if trial.method == method.name}, key=lambda share: -(share or 0)
        )
        for share, style in zip(rate_shares, itertools.cycle(("-", "--", ":", "-."))):
            points = sorted(
                (trial.learning_rate, value_of(result, "general_kl"), start - value_of(result, "test_loss"))
                for trial, result in results.items()
                if (trial.method, trial.local_share, trial.steps, trial.seed) == (method.name, share, steps, seed)
            )
            if not points:
                continue
            label = method.name if share is None else f"{method.name}, earlier blocks at {share:g} of the rate"
            _, forgetting, gain = zip(*points, strict=True)
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

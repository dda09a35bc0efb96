"""Finishes a run early when its model gets no better on the held-out rows.

It sees what rank 0 collects, off the training path, and asks the run to finish, which no stage waits for. Patience and
threshold mean what they do in `transformers.EarlyStoppingCallback`.
"""

import logging
import math
from collections.abc import Callable, Mapping

from lopt_pp.checkpoint.best import Criterion

logger = logging.getLogger(__name__)


class EarlyStopping:
    """Counts the evaluations in a row that are not better than the best before them.

    Args:
        criterion: what models are compared by.
        patience: of how many such evaluations the run finishes.
        threshold: how much a model must be better than the best before it to count as better.
        finish: asks the run to finish, with the reason in a line.
    """

    def __init__(self, criterion: Criterion, patience: int, threshold: float, finish: Callable[[str], object]) -> None:
        self._criterion, self._patience, self._threshold, self._finish = criterion, patience, threshold, finish
        self._best: float | None = None
        self._best_step = 0
        self._count = 0

    def remember(self, step: int, metrics: Mapping[str, float]) -> None:
        """Counts an evaluation.

        Args:
            step: optimizer steps done. 0 does not count: it is of the pretrained model, which is not of the run.
            metrics: what was measured, by name, where it is finite.
        """
        if step == 0:
            return
        score = self._criterion.score(metrics)
        if self._best is None or self._best - score > self._threshold:
            self._count = 0
        else:
            self._count += 1
        if self._best is None or score < self._best:
            self._best, self._best_step = score, step

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Counts an evaluation of this run, and has the run finish where it was one too many."""
        self.remember(step, metrics)
        if self._count >= self._patience:
            times = "1 evaluation" if self._count == 1 else f"{self._count} evaluations"
            best = math.inf if self._best is None else self._best
            value = -best if self._criterion.greater_is_better else best
            self._finish(
                f"{self._criterion.metric} has not improved for {times}; the best was {value:.4g} after step "
                f"{self._best_step}"
            )

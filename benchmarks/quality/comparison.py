"""All trials of a comparison, in the order that makes the most of being cut short."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.forms import Form
from benchmarks.quality.methods import Setting, Trial, grid
from benchmarks.quality.runs import Setup, measure_untouched, train_and_measure
from benchmarks.quality.speed import E2E, OWN_SHAPES, end_to_end_seconds, measure_speed
from benchmarks.quality.summary import Line, best_settings, lines_of, untouched_line

GRID_SEED = 1
"""Of the trials that the learning rates are chosen from."""


class OutOfTime(Exception):
    """The time that was given is over."""


class Comparison:
    """The trials of one folder.

    Args:
        setup: what all trials share.
        form: their number and size.
        methods: of `METHODS`.
        side_by_side: how many trials run at a time, each on a device of its own.
        pipeline_processes: of the measurement of speed.
        minutes: after which no trial is begun; None sets no limit.

    Attributes:
        untouched: what the model does as it is.
        results: of each trial that is done.
        best: by method, the learning rates that were chosen.
        speeds: by method, what a step costs; of end to end by either 1F1B.
        equal_time: by method, the steps that fit the wall time of end-to-end training by the faster 1F1B.
    """

    def __init__(
        self,
        setup: Setup,
        form: Form,
        methods: Sequence[str],
        side_by_side: int,
        pipeline_processes: int,
        minutes: float | None,
    ) -> None:
        self._setup, self._form, self._methods = setup, form, methods
        self._side_by_side, self._pipeline_processes = side_by_side, pipeline_processes
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.untouched: dict[str, Any] = {}
        self.results: dict[Trial, dict[str, Any]] = {}
        self.best: dict[str, Setting] = {}
        self.speeds: dict[str, dict[str, Any]] = {}
        self.equal_time: dict[str, int] = {}

    def run(self) -> None:
        """All of it.

        Raises:
            OutOfTime: it is to be gone on with later.
            TrialFailed: a process failed.
        """
        form = self._form
        self.untouched = measure_untouched(self._setup)
        self._train(grid(self._methods, form.rates, form.local_shares, GRID_SEED, form.steps))
        self.best = best_settings(self.results, form.steps)
        self._train_seeds(dict.fromkeys(self.best, form.steps))
        methods = list(self._methods)
        if E2E in methods and self._pipeline_processes > 1:  # One process pads nothing alike.
            methods.insert(methods.index(E2E) + 1, OWN_SHAPES)
        for method in methods:
            self.speeds[method] = measure_speed(
                self._setup, method, form.rates[0], form.timed_steps, self._pipeline_processes, self._check_time
            )
            _say(f"{method}: {self.speeds[method]['step_seconds']:.2f} s per step")
        if (seconds := end_to_end_seconds(self.speeds)) is not None:
            given = form.steps * seconds
            self.equal_time = {
                method: form.steps if method == E2E else max(1, round(given / self.speeds[method]["step_seconds"]))
                for method in self.best
            }
            self._train_seeds(self.equal_time)

    def _train_seeds(self, steps: dict[str, int]) -> None:
        """Trains each method at its best rates for so many steps, seed by seed."""
        seeds = range(GRID_SEED, GRID_SEED + self._form.seeds)
        self._train([Trial(*own, seed, steps[method]) for seed in seeds for method, own in self.best.items()])

    def _train(self, trials: Sequence[Trial]) -> None:
        train_and_measure(self._setup, trials, self._side_by_side, self._check_time, self._note)

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        if trial not in self.results:
            _say(f"{trial.name}: validation loss {result['validation_loss']:.4f}")
        self.results[trial] = result

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime

    @property
    def equal_steps_lines(self) -> list[Line]:
        """Of the table at equal steps."""
        first = [untouched_line(self.untouched)] if self.untouched else []
        return [*first, *lines_of(self.results, self.best, dict.fromkeys(self.best, self._form.steps))]

    @property
    def equal_time_lines(self) -> list[Line]:
        """Of the table at equal wall time; none before it is known."""
        return lines_of(self.results, self.best, self.equal_time) if self.equal_time else []


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

"""What a run has measured on its held-out rows, step by step: kept for whoever asks, and told to whoever listens."""

import threading
from collections.abc import Callable, Mapping, Sequence

from lopt_pp.config.evaluation import eval_prefix
from lopt_pp.metrics.jsonl import finite, measured
from lopt_pp.metrics.records import Record

Listening = Callable[[int, Mapping[str, float]], object]
"""Is given the steps done, and what was measured then, by name, where it is finite."""


class Evaluations:
    """What was measured on held-out rows, by the number of steps done. Its methods may be called from any thread.

    Args:
        steps_done: before this run.
        set_names: of the sets of rows.
        on_evaluation: is told of each evaluation of this run, as soon as all stages have reported its step.
        on_earlier: is told, before those, of each that the run had made before it went on from a checkpoint.
    """

    def __init__(
        self,
        steps_done: int = 0,
        set_names: Sequence[str] = ("",),
        on_evaluation: Listening = lambda step, values: None,
        on_earlier: Listening = lambda step, values: None,
    ) -> None:
        self.set_names = tuple(set_names)
        self._on_evaluation, self._on_earlier = on_evaluation, on_earlier
        self._changed = threading.Condition()
        self._step = steps_done
        """The last step whose records are all there."""
        self._is_over = False
        self._values: dict[int, Mapping[str, float]] = {}

    def remember(self, earlier: Mapping[int, Mapping[str, float]]) -> None:
        """Takes what was measured before the run went on from a checkpoint, by step."""
        with self._changed:
            self._values |= earlier
        for step, values in sorted(earlier.items()):
            self._on_earlier(step, values)

    def add(self, step: int, record: Record) -> list[str]:
        """Takes the last stage's record of a step, where all stages have reported it.

        Returns:
            A line for the log on each set of rows, if they were evaluated then.
        """
        values = measured(record)
        with self._changed:
            if values:
                self._values[step] = finite(values)
            self._step = step
            self._changed.notify_all()
        if values:
            self._on_evaluation(step, finite(values))
        return [line for name in self.set_names if (line := _in_words(name, self.set_names, values))]

    def end(self) -> None:
        """Says that no more records come: whoever waits for a step gets what there is."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def after(self, step: int) -> Mapping[str, float]:
        """What was measured after a step, by name, where it is finite; nothing where it was not evaluated.

        Waits for the records of the step, which all stages must make, or have made before the run went on from a
        checkpoint; or for the end of all records.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._step >= step)
            return self._values.get(step, {})


def _in_words(name: str, names: Sequence[str], values: Mapping[str, float]) -> str:
    """What was measured on a set of rows; empty where nothing was."""
    prefix, others = eval_prefix(name), [eval_prefix(other) for other in names if other not in ("", name)]
    own = {
        key.removeprefix(prefix): value
        for key, value in values.items()
        if key.startswith(prefix) and not any(key.startswith(other) and len(other) > len(prefix) for other in others)
    }
    if "loss" not in own:
        return ""
    words = [f"eval loss {own.pop('loss'):.4g}", *(f"{key} {value:.4g}" for key, value in sorted(own.items()))]
    return f"{name}: {', '.join(words)}" if name else ", ".join(words)

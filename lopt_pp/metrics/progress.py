"""How far a run is, how fast, and how long it still takes: a bar on a terminal, and the lines of the log."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import mean

from tqdm import tqdm

from lopt_pp.metrics.logs import Window
from lopt_pp.metrics.records import Record

_RECENT = 20
"""Steps that the speed is the mean of."""

_BAR = "|{bar}| {n_fmt}/{total_fmt} [{elapsed}<"
_EVALUATION_BAR = "evaluating |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"


class Speed:
    """How fast the last steps were, without evaluations and checkpoints.

    Args:
        saves_after: whether a checkpoint is due after a step.
    """

    def __init__(self, saves_after: Callable[[int], bool] = lambda step: False) -> None:
        self._saves_after = saves_after
        self._steps: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        """(seconds, tokens) of steps in which there was nothing else."""
        self._disturbed: tuple[float, float] | None = None
        """The last of the others, without the time of its own evaluation."""
        self._was_disturbed = True
        """Whether something was after the step before; there is much before the first."""

    def add(self, step: int, record: Record) -> None:
        """Takes the last stage's record of a step; 0 is an evaluation before the first."""
        if step == 0:
            return
        evaluating = record.get("eval_seconds", 0.0)
        seconds = max(record["step_seconds"] - evaluating, 1e-9)
        if self._was_disturbed or evaluating:
            self._disturbed = seconds, record["num_tokens"]
        else:
            self._steps.append((seconds, record["num_tokens"]))
        self._was_disturbed = bool(evaluating) or self._saves_after(step)

    def pause(self) -> None:
        """Something else was after the last step than the next one, such as an evaluation of its own."""
        self._was_disturbed = True

    @property
    def seconds_per_step(self) -> float | None:
        """None before the first step."""
        steps = self._known
        return mean(seconds for seconds, _ in steps) if steps else None

    @property
    def tokens_per_second(self) -> float:
        steps = self._known
        return sum(tokens for _, tokens in steps) / sum(seconds for seconds, _ in steps) if steps else 0.0

    @property
    def _known(self) -> list[tuple[float, float]]:
        return list(self._steps) or ([self._disturbed] if self._disturbed else [])


class Progress:
    """Takes the records of each step, and says how far the run is.

    Args:
        loss_names: of each stage, in order; None for one without a loss.
        num_steps: of the run.
        steps_done: before this process began.
        saves_after: whether a checkpoint is due after a step.
    """

    def __init__(
        self,
        loss_names: Sequence[str | None],
        num_steps: int,
        steps_done: int = 0,
        saves_after: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self._loss_names, self._num_steps, self._step = loss_names, num_steps, steps_done
        self.speed = Speed(saves_after)
        self._window = Window()
        self._begun = time.perf_counter()
        self._status = ""

    def add(self, step: int, records: Sequence[Record]) -> None:
        """Takes a step's records, one of each stage; of step 0 there is nothing to say."""
        self.speed.add(step, records[-1])
        if step > 0:
            self._step = step
            self._window.add(records)
            self._status = self._short_status(records)

    def line(self) -> str:
        """What the log says of the steps since its last line."""
        records = self._window.take()
        stages = [
            text
            for stage, (name, record) in enumerate(zip(self._loss_names, records, strict=True))
            if (text := _of_stage(stage, name, record))
        ]
        left = f", {_interval(self.seconds_left)} left" if self._step < self._num_steps else ""
        return f"{', '.join([*stages, self._speed])}{left}"

    def bar(self, columns: int) -> str:
        """The bar of the run, or that of the evaluation which goes on, for so many columns."""
        if (part := EVALUATING.state()) is not None:
            done, total, seconds = part
            return tqdm.format_meter(done, total, seconds, ncols=columns, bar_format=_EVALUATION_BAR)
        status = f", {self._status}" if self._status else ""
        form = f"{_BAR}{_interval(self.seconds_left)}{status}]"
        elapsed = time.perf_counter() - self._begun
        return tqdm.format_meter(self._step, self._num_steps, elapsed, ncols=columns, bar_format=form)

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last steps; None where no step has been made."""
        seconds = self.speed.seconds_per_step
        return None if seconds is None else seconds * (self._num_steps - self._step)

    @property
    def _speed(self) -> str:
        return f"{self.speed.tokens_per_second:.0f} tokens/s"

    def _short_status(self, records: Sequence[Record]) -> str:
        """The task loss, the local losses of the stages before it, and the speed."""
        named = [
            (name, record[name])
            for name, record in zip(self._loss_names, records, strict=True)
            if name and name in record
        ]
        *earlier, (_, loss) = named if self._loss_names[-1] in records[-1] else [*named, ("", None)]
        values = "/".join(f"{value:.3g}" for _, value in earlier)
        local = [f"{earlier[0][0].removesuffix('_loss')} {values}"] if earlier else []
        return ", ".join([*([] if loss is None else [f"loss {loss:.4g}"]), *local, self._speed])


def _of_stage(stage: int, loss: str | None, record: Record) -> str:
    if loss is None or loss not in record:
        return ""
    short = {"learning_rate": "lr", "grad_norm": "grad_norm"}
    others = [f"{text} {record[name]:.3g}" for name, text in short.items() if name in record]
    return f"stage {stage} {loss} {record[loss]:.4g}" + (f" ({', '.join(others)})" if others else "")


def _interval(seconds: float | None) -> str:
    return "?" if seconds is None else str(tqdm.format_interval(seconds))


class Evaluating:
    """How far this process is with its part of an evaluation, which lasts as long as this context.

    Only counts: nothing is written, and nothing waited for.
    """

    def __init__(self) -> None:
        self._begun: float | None = None
        self._done = self._total = 0

    def __enter__(self) -> None:
        self._done = self._total = 0
        self._begun = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._begun = None

    def done(self, number: int, total: int) -> None:
        """Says that so many microbatches of how many are done."""
        self._done, self._total = number, total

    def state(self) -> tuple[int, int, float] | None:
        """Microbatches that are done, of how many, and the seconds since it began; None while there is none."""
        begun = self._begun
        return None if begun is None or not self._total else (self._done, self._total, time.perf_counter() - begun)


EVALUATING = Evaluating()
"""That of this process."""

"""Drives transformers' `TrainerCallback`s, on rank 0 and off the training path, from the records of all stages.

They come from `--report_to` (`lopt_pp.metrics.trackers`) and from whoever calls `Trainer(callbacks=...)`. All of them
are called in one thread of their own, in order: some trackers keep their run by thread, and none of them may hold up
training, the log or the progress bar, however slow its network is.

Events come when rank 0 has heard of a step from all stages, which is some steps after the first stage has made it; so
what a callback asks for through its `control` takes effect later than in transformers, see `Callbacks`. The events are
those of transformers in its order:

    on_init_end, on_train_begin, (on_epoch_begin), on_step_begin
    of each step: on_step_end, (on_epoch_end, on_epoch_begin), on_log, on_evaluate, on_save, on_step_begin
    on_train_end

`on_log` comes every `--logging_steps`, at the last step, with an evaluation and at the end, with the names of
`lopt_pp.metrics.logs`. There is nothing within a step (`on_substep_end`, `on_optimizer_step`): no process sees it of
all stages.
"""

import logging
import math
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import nan
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from lopt_pp.errors import LoptError, first_line
from lopt_pp.metrics.arguments import RunArguments
from lopt_pp.metrics.logs import Window, evaluation_logs, logs_after, training_logs
from lopt_pp.metrics.records import Record
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)


@dataclass
class Called:
    """A callback, and what belongs to it.

    Attributes:
        callback: of transformers.
        name: what it is called in messages.
        is_own: whether the user has given it, so that the traceback of what it raises helps.
        arguments: that it is given instead of those that all are given.
        beginning: a context for its `on_train_begin`.
        finish: called after its `on_train_end`.
    """

    callback: TrainerCallback
    name: str
    is_own: bool = False
    arguments: RunArguments | None = None
    beginning: Callable[[], AbstractContextManager[object]] = nullcontext
    finish: Callable[[], object] = field(default=lambda: None)


def called_as(callback: TrainerCallback | type[TrainerCallback]) -> Called:
    """A callback that the user has given, or its class, as transformers takes both."""
    made = callback() if isinstance(callback, type) else callback
    return Called(made, f"the callback {type(made).__name__}", is_own=True)


class Callbacks:
    """Calls callbacks; a `Listener` of the `Collector`, which tells it of the steps.

    For the callbacks of a user: `Callbacks([called_as(callback), ...], ..., act=act)`, where `act(step, control)` is
    called in the callbacks' thread after the events of a step in which one of them has set
    `control.should_training_stop`, `should_epoch_stop`, `should_evaluate` or `should_save`; it has the run do so as
    soon as it can. Afterwards all but the first are off again, as in transformers. `control.should_log` brings an
    `on_log` at once. `state` is what they are given: `state.log_history` has all logs of the run so far.

    A callback that raises an error is called no more, and a warning says so once, with the traceback where it is the
    user's own: neither a tracker's network nor a plot is worth the run. Only what raises before the first step is an
    error of the whole run, since it is mostly a flag, a login or a package; of a run that goes on from a checkpoint a
    tracker is left out instead, so that a restart at night does not end of it. One that raises `KeyboardInterrupt` or
    `SystemExit` has asked for the run's end, as by `should_training_stop`.

    Args:
        called: the callbacks, in order.
        arguments: of the run.
        num_steps: of the run.
        steps_done: before this process began.
        model: what they are given as `model`.
        processing_class: likewise.
        act: see above.
        logs_every: steps between logs, 0 for none; None for `--logging_steps`.
        steps_per_epoch: of the run, whose epochs are counted by it, as in `transformers`; None for
            `--num_train_epochs`.
    """

    name = "the callbacks"

    def __init__(
        self,
        called: Sequence[Called],
        arguments: RunArguments,
        num_steps: int,
        steps_done: int = 0,
        *,
        model: Any = None,
        processing_class: Any = None,
        act: Callable[[int, TrainerControl], None] = lambda step, control: None,
        logs_every: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        self._called = list(called)
        self._arguments = arguments
        self._steps_done = steps_done
        self._act = act
        self._given = {
            "model": model,
            "processing_class": processing_class,
            "optimizer": None,
            "lr_scheduler": None,
            "train_dataloader": None,
            "eval_dataloader": None,
        }
        self.control = TrainerControl()
        self.state = TrainerState(
            global_step=steps_done,
            max_steps=num_steps,
            logging_steps=int(arguments.logging_steps),
            eval_steps=int(arguments.eval_steps or num_steps),
            save_steps=int(arguments.save_steps),
            train_batch_size=arguments.per_device_train_batch_size,
            num_train_epochs=math.ceil(num_steps / steps_per_epoch if steps_per_epoch else arguments.num_train_epochs),
        )
        self._logs_every = int(arguments.logging_steps) if logs_every is None else logs_every
        self._window = Window()
        self._losses: list[float] = []
        self._num_tokens = self._tokens_before = 0.0
        self._begun = time.perf_counter()
        self._has_begun = False
        self._events: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...], Future[None]]] = queue.SimpleQueue()
        in_background(self._run)

    def remember(self, logs: Sequence[dict[str, float]]) -> None:
        """Takes the logs of the steps that were made before a checkpoint into `state`, and calls nothing.

        Args:
            logs: as `log_history` has them. What was best among them stays so, for early stopping and others.
        """
        for own in logs:
            self.state.global_step, self.state.epoch = int(own["step"]), own.get("epoch", self.state.epoch)
            self.state.log_history.append(own)
            self._note_best(own)
            self._tokens_before = own.get("num_tokens", self._tokens_before)
        self.state.global_step = self._steps_done

    def begin(self) -> None:
        """Calls `on_init_end` and `on_train_begin`, and waits for them.

        Raises:
            LoptError: a callback cannot begin.
        """
        self._put(self._begin).result()

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        self._put(self._step, step, records)

    def saved(self, step: int) -> None:
        self._put(self._saved, step)

    def end(self) -> None:
        """Calls `on_train_end`, and waits until all callbacks have heard of everything."""
        self._put(self._end).result()

    def _put(self, event: Callable[..., None], *values: Any) -> Future[None]:
        done: Future[None] = Future()
        self._events.put((event, values, done))
        return done

    def _run(self) -> None:
        is_over = False
        while not is_over:
            event, values, done = self._events.get()
            is_over = event == self._end
            try:
                event(*values)
            except BaseException as error:  # It is for who waits for it.
                done.set_exception(error)
            else:
                done.set_result(None)

    def _begin(self) -> None:
        self._begun = time.perf_counter()
        self._call("on_init_end")
        self._call("on_train_begin")
        self._has_begun = True
        self._call("on_epoch_begin")
        self._call("on_step_begin")

    def _step(self, step: int, records: Sequence[Record]) -> None:
        state = self.state
        epoch_before, state.epoch = int(state.epoch), float(records[-1].get("epoch", state.epoch))
        state.global_step = step
        if step > 0:
            self._window.add(records)
            self._losses += [records[-1]["loss"]] if "loss" in records[-1] else []
            self._num_tokens += records[-1]["num_tokens"]
            state.num_input_tokens_seen = int(self._num_tokens)
            self._call("on_step_end")
            if int(state.epoch) > epoch_before:
                self._call("on_epoch_end")
                self._call("on_epoch_begin")
            first = self._arguments.logging_first_step
            if self.control.should_log or logs_after(step, self._logs_every, first, state.max_steps):
                self.control.should_log = False
                self._log_training()
        if metrics := evaluation_logs(records):
            self._log(metrics)
            self._call("on_evaluate", metrics=metrics)
            self._note_best(metrics)
        asked = self.control
        if asked.should_training_stop or asked.should_epoch_stop or asked.should_evaluate or asked.should_save:
            self._act(step, asked)
            asked.should_epoch_stop = asked.should_evaluate = asked.should_save = False
        if step < state.max_steps:
            self._call("on_step_begin")

    def _saved(self, step: int) -> None:
        # The checkpoint of a step is complete some steps later, and trackers name it by the step of the state.
        now, self.state.global_step = self.state.global_step, step
        self._call("on_save")
        self.state.global_step = now

    def _end(self) -> None:
        if self._window and self._logs_every:  # The run has ended before its last step.
            self._log_training()
        steps, seconds = self.state.global_step - self._steps_done, time.perf_counter() - self._begun
        if steps > 0:
            summary = {"train_runtime": seconds, "train_steps_per_second": steps / seconds}
            summary |= {
                "train_tokens_per_second": self._num_tokens / seconds,
                "train_loss": fmean(self._losses or [nan]),
            }
            self._log(summary | {"epoch": self.state.epoch})
        self._call("on_train_end")
        for called in list(self._called):
            self._guarded(called, "on_train_end", called.finish)

    def _log_training(self) -> None:
        self._log(training_logs(self._window.take(), self._tokens_before + self._num_tokens))

    def _log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append(logs | {"step": self.state.global_step})
        for called in list(self._called):  # Each has its own, since some take things out of it.
            self._call_one(called, "on_log", logs=dict(logs))

    def _note_best(self, metrics: dict[str, float]) -> None:
        """After `on_evaluate`, as in transformers: early stopping compares with what was the best before."""
        name = self._arguments.metric_for_best_model or "loss"
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        best = self.state.best_metric
        if value is None or (
            best is not None and not (value > best if self._arguments.greater_is_better else value < best)
        ):
            return
        self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def _call(self, event: str, **values: Any) -> None:
        for called in list(self._called):
            self._call_one(called, event, **values)

    def _call_one(self, called: Called, event: str, **values: Any) -> None:
        arguments = called.arguments or self._arguments

        def call() -> None:
            with called.beginning() if event == "on_train_begin" else nullcontext():
                changed = getattr(called.callback, event)(arguments, self.state, self.control, **self._given, **values)
            if changed is not None:
                self.control = changed

        self._guarded(called, event, call)

    def _guarded(self, called: Called, event: str, call: Callable[[], object]) -> None:
        try:
            call()
        except BaseException as error:  # Whatever a tracker's library, or code of the user's own, raises.
            if not self._has_begun and (called.is_own or self._steps_done == 0):
                raise LoptError(f"{called.name}: {first_line(error)}") from error
            self._called.remove(called)
            is_failure = isinstance(error, Exception)
            if not is_failure:  # KeyboardInterrupt or SystemExit, which would end nothing in this thread.
                self.control.should_training_stop = True
            logger.warning(
                "%s has failed in %s: %s. %s",
                called.name,
                event,
                first_line(error) if is_failure else type(error).__name__,
                "Training goes on without it" if is_failure else "The run finishes, as by should_training_stop",
                exc_info=error if called.is_own and is_failure else None,
            )

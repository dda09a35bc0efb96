"""transformers' callbacks, driven from the records of all stages."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from accelerate.state import PartialState
from synthetic_runs import record
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from lopt_pp.config.parser import load_config
from lopt_pp.config.train_config import EFFECTS, SECRETS
from lopt_pp.errors import LoptError
from lopt_pp.metrics.arguments import RunArguments, as_training_arguments
from lopt_pp.metrics.callbacks import Callbacks, Called, called_as

NUM_STEPS = 4


def arguments(evaluates: bool = True, **flags: Any) -> RunArguments:
    given: dict[str, Any] = {"model_name_or_path": "m", "train_file": "rows.jsonl", "output_dir": "there/out"}
    given |= {"logging_steps": 2} | flags
    return as_training_arguments(load_config(**given), NUM_STEPS, evaluates=evaluates, num_processes=2)


def of_step(step: int, eval_loss: float | None = None) -> list[dict[str, Any]]:
    """Two stages; two steps are an epoch."""
    measured = {} if eval_loss is None else {"eval_loss": eval_loss, "eval_perplexity": 2.0, "eval_seconds": 0.25}
    own = {} if eval_loss is None else {"eval_reconstruction_loss": 0.5}
    last = {"loss": 2.0 * step, "grad_norm": 1.5, "learning_rate": 1e-4, "epoch": step / 2}
    return [
        record(0, step, {"forward": 0.5}, reconstruction_loss=float(step), grad_norm=0.5, epoch=step / 2, **own),
        record(1, step, {"forward": 0.25, "wait_receive": 0.5}, **last | measured),
    ]


class Recording(TrainerCallback):
    """Notes every event with its step, and does what it is told at one of them."""

    def __init__(self, **actions: Any) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []
        self._actions = actions

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **given: Any) -> Any:
            self.events.append(f"{name.removeprefix('on_')} {state.global_step}")
            if name == "on_log":
                self.logs.append(given["logs"])
            action = self._actions.get(f"{name}_{state.global_step}", self._actions.get(name))
            return action(control) if action else None

        return note


def drive(
    *callbacks: TrainerCallback,
    evaluated: dict[int, float] | None = None,
    steps: Sequence[int] = range(1, NUM_STEPS + 1),
    **options: Any,
) -> Callbacks:
    called = options.pop("called", [called_as(callback) for callback in callbacks])
    driven = Callbacks(called, options.pop("arguments", arguments()), NUM_STEPS, **options)
    driven.begin()
    for step in steps:
        driven.step(step, of_step(step, (evaluated or {}).get(step)), [])
    driven.saved(3)
    driven.end()
    return driven


def test_events_come_in_the_order_of_transformers() -> None:
    callback = Recording()
    driven = drive(callback, evaluated={2: 1.0})
    assert callback.events == [
        *["init_end 0", "train_begin 0", "epoch_begin 0", "step_begin 0", "step_end 1", "step_begin 1"],
        *["step_end 2", "epoch_end 2", "epoch_begin 2", "log 2", "log 2", "evaluate 2", "step_begin 2"],
        *["step_end 3", "step_begin 3", "step_end 4", "epoch_end 4", "epoch_begin 4", "log 4"],
        *["save 3", "log 4", "train_end 4"],
    ]
    state = driven.state
    assert (state.global_step, state.max_steps, state.epoch, state.is_world_process_zero) == (4, 4, 2.0, True)
    assert state.num_input_tokens_seen == 400 and len(state.log_history) == 4
    assert state.log_history[0]["step"] == 2 and (state.best_metric, state.best_global_step) == (1.0, 2)


def test_logs_have_the_names_of_transformers_and_those_of_all_stages() -> None:
    callback = Recording()
    drive(callback, evaluated={2: 1.0})
    training, measured, _, end = callback.logs
    # Losses are means of two steps, the rest is of the last; a step of a second has 100 tokens.
    assert {name: training[name] for name in ("loss", "grad_norm", "learning_rate", "epoch")} == {
        "loss": 3.0,
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
        "epoch": 1.0,
    }
    assert training["reconstruction_loss/stage 0"] == 1.5 and training["loss/stage 1"] == 3.0
    assert training["share computing/stage 0"] == 0.5 and training["share waiting to receive/stage 1"] == 0.5
    assert training["tokens_per_second/stage 1"] == 100.0 and training["step_seconds/stage 0"] == 1.0
    assert training["num_tokens"] == 200.0  # So far, as TRL counts them.
    assert not any(name.startswith(("eval_", "forward_seconds", "step/", "stage/", "steps")) for name in training)
    assert measured == {
        "eval_loss": 1.0,
        "eval_perplexity": 2.0,
        "eval_reconstruction_loss/stage 0": 0.5,
        "eval_runtime": 0.25,
        "epoch": 1.0,
    }
    assert end["train_loss"] == 5.0 and end["train_runtime"] > 0 and end["train_tokens_per_second"] > 0


def test_an_evaluation_before_the_first_step_is_step_0() -> None:
    callback = Recording()
    drive(callback, evaluated={0: 2.0}, steps=[0, 1], arguments=arguments(logging_first_step=True))
    assert [event for event in callback.events if "log" in event or "eval" in event] == [
        *["log 0", "evaluate 0", "log 1", "log 1"]
    ]


def test_what_a_callback_asks_for_is_handed_on_once() -> None:
    def stop(control: TrainerControl) -> TrainerControl:
        return TrainerControl(should_training_stop=True, should_save=True)

    asked: list[tuple[int, bool, bool, bool]] = []

    def act(step: int, control: TrainerControl) -> None:
        asked.append((step, control.should_training_stop, control.should_save, control.should_evaluate))

    def log(control: TrainerControl) -> None:
        control.should_log = True

    callback = Recording(on_step_end_1=log, on_evaluate_2=lambda c: setattr(c, "should_evaluate", True), on_log_4=stop)
    drive(callback, evaluated={2: 1.0}, act=act)
    assert asked == [(2, False, False, True), (4, True, True, False)]
    assert "log 1" in callback.events and callback.logs[0]["loss"] == 2.0 and callback.logs[1]["loss"] == 4.0


def test_early_stopping_of_transformers_stops() -> None:
    stopped: list[int] = []
    driven = drive(
        EarlyStoppingCallback(early_stopping_patience=2),
        evaluated={1: 1.0, 2: 0.5, 3: 0.75, 4: 0.625},
        act=lambda step, control: stopped.append(step),
    )
    assert stopped == [4] and driven.state.best_global_step == 2


def test_a_run_that_goes_on_knows_what_was_logged_before() -> None:
    """Early stopping counts on: the third evaluation in a row is no better than the first."""
    earlier = [{"loss": 2.0, "epoch": 0.5, "step": 1}, {"eval_loss": 0.5, "epoch": 1.0, "step": 2}]
    stopped: list[int] = []
    driven = Callbacks(
        [called_as(EarlyStoppingCallback(early_stopping_patience=2))],
        arguments(),
        NUM_STEPS,
        steps_done=2,
        act=lambda step, control: stopped.append(step),
    )
    driven.remember(earlier)
    assert (driven.state.global_step, driven.state.epoch, driven.state.best_global_step) == (2, 1.0, 2)
    driven.begin()
    for step in (3, 4):
        driven.step(step, of_step(step, 0.75), [])
    driven.end()
    assert driven.state.log_history[:2] == earlier and stopped == [4] and driven.state.best_metric == 0.5


def fail(control: TrainerControl) -> None:
    raise ValueError("disk full\nand more")


def test_one_that_fails_is_called_no_more_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    failing, tracker, good = Recording(on_step_end=fail), Recording(on_log=fail), Recording()
    called = [called_as(failing), Called(tracker, "--report_to there"), called_as(good)]
    driven = drive(called=called)
    assert failing.events[-1] == "step_end 1" and tracker.events[-1] == "log 2"
    assert good.events[-1] == "train_end 4" and len(driven.state.log_history) == 3
    assert caplog.messages == [
        "the callback Recording has failed in on_step_end: disk full. Training goes on without it",
        "--report_to there has failed in on_log: disk full. Training goes on without it",
    ]
    assert [record.exc_info is not None for record in caplog.records] == [True, False]


def test_one_that_cannot_begin_is_an_error_before_the_first_step() -> None:
    with pytest.raises(LoptError, match="^--report_to there: disk full$"):
        drive(called=[Called(Recording(on_train_begin=fail), "--report_to there")])
    with pytest.raises(LoptError, match="^the callback Recording: disk full$"):
        drive(Recording(on_init_end=fail), steps_done=2, steps=[3])


def test_a_tracker_that_cannot_begin_does_not_end_a_run_that_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    good = Recording()
    driven = drive(called=[Called(Recording(on_train_begin=fail), "--report_to there"), called_as(good)], steps_done=2)
    assert "--report_to there has failed in on_train_begin: disk full. Training goes on without it" in caplog.messages
    assert good.events[0] == "init_end 2" and driven.state.log_history


def test_a_callback_may_be_given_as_its_class() -> None:
    assert isinstance(called_as(Recording).callback, Recording)


def test_arguments_say_what_the_run_does_and_touch_nothing() -> None:
    before = dict(PartialState._shared_state)
    made = arguments(
        learning_rate=3e-4, lr_scheduler_type="cosine", dtype="bfloat16", save_steps=0, eval_steps=0, num_stages=2
    )
    assert PartialState._shared_state == before and "_setup_devices" not in vars(made)
    assert (made.learning_rate, str(made.lr_scheduler_type), made.bf16, made.logging_steps) == (
        3e-4,
        str(SchedulerType.COSINE),
        True,
        2,
    )
    assert (made.eval_strategy, made.eval_steps) == (IntervalStrategy.STEPS, NUM_STEPS)
    assert (made.save_strategy, made.save_steps) == (SaveStrategy.NO, NUM_STEPS)
    assert (made.run_name, made.output_dir, made.world_size) == ("out", "there/out", 2)
    assert made.should_log and made.should_save and made.process_index == made.local_process_index == made.n_gpu == 0
    assert (made.metric_for_best_model, made.greater_is_better) == ("loss", False)
    assert made.to_dict().keys() == EFFECTS.keys() - SECRETS and made.to_dict()["num_stages"] == 2
    assert made.to_sanitized_dict()["num_stages"] == 2 and '"num_stages": 2' in made.to_json_string()
    assert arguments(evaluates=False).eval_strategy == IntervalStrategy.NO

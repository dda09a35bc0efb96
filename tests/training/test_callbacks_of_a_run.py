"""Callbacks of transformers in a run: what they are told, and what they ask for."""

import math
import threading
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from lopt_pp import Trainer
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.distributed.shutdown import StopCoordinator
from lopt_pp.training.checkpointing import Checkpointer

STEPS = 40


class Asking(TrainerCallback):
    """Asks for an evaluation and a checkpoint once, and to stop when it is told of that evaluation."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.evaluated: list[int] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.told.append("begin")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.told.append(f"step {state.global_step}")
        if state.global_step == 3:
            control.should_evaluate = control.should_save = control.should_epoch_stop = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert kwargs["metrics"]["eval_loss"] > 0
        self.evaluated.append(state.global_step)
        control.should_training_stop = True

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.told.append("end")


@pytest.fixture
def in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the run wait after some steps until it has decided on what was asked for: it would be over before."""
    asked = [threading.Event(), threading.Event()]
    farthest, after_step = StopCoordinator._farthest, Checkpointer.after_step

    def hear(coordinator: StopCoordinator, number: int) -> tuple[int, int]:
        found = farthest(coordinator, number)
        asked[number].set()
        return found

    def wait(checkpointer: Checkpointer, steps_done: int) -> None:
        after_step(checkpointer, steps_done)
        assert steps_done not in (10, 30) or asked[steps_done == 30].wait(60)

    monkeypatch.setattr(StopCoordinator, "_farthest", hear)
    monkeypatch.setattr(Checkpointer, "after_step", wait)


def flags(inputs: Path, out: Path, **more: Any) -> dict[str, Any]:
    given = {"model_name_or_path": inputs / "model", "train_file": inputs / "rows.jsonl", "output_dir": out}
    return given | {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **more}


@pytest.mark.usefixtures("in_step")
def test_what_a_callback_asks_for(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is done after a step that no flag names, and the run finishes where it is stopped: its model is there."""
    asking, out = Asking(), tmp_path / "out"
    trainer = Trainer(
        args=flags(inputs, out, eval_file=inputs / "rows.jsonl", eval_steps=0, save_steps=1000, logging_steps=2),
        callbacks=[asking, PrinterCallback],
    )
    result = trainer.train()
    steps = result.global_step
    besides, last = asking.evaluated
    assert result and 3 < besides < last == steps < STEPS
    assert asking.told == ["begin", *(f"step {step}" for step in range(1, steps + 1)), "end"]
    assert [path.name for path in complete_checkpoints(out)] == [f"checkpoint-{steps}", f"checkpoint-{besides}"]
    # What was logged, as transformers has it.
    history = trainer.state.log_history
    assert [logs["step"] for logs in history if "eval_loss" in logs] == [besides, last]
    assert [logs["step"] for logs in history if "loss" in logs] == [*range(2, steps, 2), steps]
    assert history[-1]["train_loss"] == result.training_loss == pytest.approx(result.metrics["train_loss"])
    assert trainer.state.global_step == steps and "'eval_loss': " in capsys.readouterr().out
    epochs = math.ceil(STEPS / (steps / (trainer.state.epoch or 0)))
    assert trainer.state.num_train_epochs == epochs != 3, "by --max_steps, and not by --num_train_epochs"
    assert trainer.model.num_parameters() > 0


def test_early_stopping(inputs: Path, tmp_path: Path) -> None:
    """Of transformers: a loss that cannot improve by so much ends the run."""
    trainer = Trainer(
        args=flags(inputs, tmp_path / "out", max_steps=5000, eval_split_size=2, eval_steps=5, save_steps=0),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=100.0)],
    )
    result = trainer.train()
    steps = result.global_step
    assert result and 10 < steps < 5000
    evaluations = {logs["step"]: logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs}
    assert trainer.state.best_metric == min(evaluations.values())
    assert evaluations[trainer.state.best_global_step or 0] == trainer.state.best_metric
    # It is finished, and has come no farther than it had.
    again = trainer.train(resume_from_checkpoint=True)
    assert again and again.global_step == trainer.state.global_step == steps


class Interrupting(TrainerCallback):
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("in_step")
def test_an_interrupt_in_a_callback(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stops the run, as should_training_stop does; in the callbacks' thread it would end nothing."""
    trainer = Trainer(args=flags(inputs, tmp_path / "out", logging_steps=1), callbacks=[Interrupting])
    result = trainer.train()
    assert result and result.global_step < STEPS
    assert caplog.text.count("the callback Interrupting has failed in on_step_end: KeyboardInterrupt. The run fin") == 1
    assert [logs["step"] for logs in trainer.state.log_history if "loss" in logs] == [*range(1, result.global_step + 1)]


def test_what_cannot_be_had_is_passed_over(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(args=flags(inputs, tmp_path / "out", max_steps=5, save_steps=0), callbacks=[Asking])
    assert trainer.train().global_step == 5
    assert caplog.text.count("a callback sets should_epoch_stop after step 3: no epoch is cut short here") == 1
    assert "a callback asks for an evaluation, and there are no rows to evaluate on: it is passed over" in caplog.text
    assert "a callback asks for a checkpoint, and --save_steps 0 turns checkpoints off" in caplog.text
    (own,) = trainer.callbacks
    trainer.add_callback(PrinterCallback)
    assert trainer.pop_callback(Asking) is own and trainer.pop_callback(own) is None
    trainer.remove_callback(PrinterCallback)
    assert not trainer.callbacks

"""What comes of a run."""

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from lopt_pp.checkpoint.best import criterion_named
from lopt_pp.config.train_config import Config
from lopt_pp.metrics.history import log_history, mean_loss, read_records, steps_per_epoch


@dataclass(frozen=True)
class RunResult:
    """How far a run has come; true where its model is there.

    Attributes:
        has_finished: whether its model is there; otherwise it was asked to stop, and can go on from its checkpoint.
        steps_before: that were done when it began.
        steps_done: since its first step, those included.
    """

    has_finished: bool
    steps_before: int
    steps_done: int

    def __bool__(self) -> bool:
        return self.has_finished


class TrainResult(TrainOutput):
    """What `transformers` returns of a training: `global_step`, `training_loss` and `metrics`.

    It is true where the model is there, and false where a signal has stopped the run, which can go on from its
    checkpoint.
    """

    has_finished: bool = True

    def __bool__(self) -> bool:
        return self.has_finished


def summarize(config: Config, result: RunResult, seconds: float, state: TrainerState) -> TrainResult:
    """What `train` returns.

    Args:
        config: of the run.
        result: how far it has come.
        seconds: that it took.
        state: is given what the run has logged, how far it has come, and what was best.
    """
    records = read_records(Path(config.run.output_dir) / "metrics.jsonl", result.steps_done)
    loss = mean_loss(records, result.steps_before)
    every = config.run.logs_every(steps_per_epoch(records))
    history = log_history(records, result.steps_done, every, config.run.logging_first_step)
    epoch = next((logs["epoch"] for logs in reversed(history) if "epoch" in logs), 0.0)
    steps = result.steps_done - result.steps_before
    metrics = {"train_runtime": seconds, "train_steps_per_second": steps / seconds, "train_loss": loss, "epoch": epoch}
    history.append(metrics | {"step": result.steps_done})
    returned = TrainResult(result.steps_done, loss, metrics)
    returned.has_finished = result.has_finished
    state.global_step, state.epoch, state.log_history = result.steps_done, epoch, history
    _note_best(state, config)
    return returned


def _note_best(state: TrainerState, config: Config) -> None:
    """Notes the best of the evaluations in the log; of equals the earlier one, as `transformers` does."""
    criterion = criterion_named(config.evaluation, config.evaluation.metric_for_best_model or "loss")
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    best = math.inf
    for logs in state.log_history:
        if logs["step"] > 0 and (score := criterion.score(logs)) < best:
            best, state.best_metric, state.best_global_step = score, logs[criterion.metric], int(logs["step"])
    checkpoint = Path(config.run.output_dir) / f"checkpoint-{state.best_global_step}"
    if checkpoint.is_dir():
        state.best_model_checkpoint = str(checkpoint)

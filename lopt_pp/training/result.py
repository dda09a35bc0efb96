"""What comes of a run."""

from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import TrainOutput

from lopt_pp.config.train_config import Config
from lopt_pp.metrics.history import log_history, mean_loss, read_records


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


def summarize(config: Config, result: RunResult, seconds: float) -> tuple[TrainResult, list[dict[str, float]]]:
    """What `train` returns, and the run's `log_history`.

    Args:
        config: of the run.
        result: how far it has come.
        seconds: that it took.
    """
    records = read_records(Path(config.run.output_dir) / "metrics.jsonl", result.steps_done)
    loss = mean_loss(records, result.steps_before)
    history = log_history(records, result.steps_done, config.run.logging_steps, config.run.logging_first_step)
    epoch = next((logs["epoch"] for logs in reversed(history) if "epoch" in logs), 0.0)
    steps = result.steps_done - result.steps_before
    metrics = {"train_runtime": seconds, "train_steps_per_second": steps / seconds, "train_loss": loss, "epoch": epoch}
    history.append(metrics | {"step": result.steps_done})
    returned = TrainResult(result.steps_done, loss, metrics)
    returned.has_finished = result.has_finished
    return returned, history

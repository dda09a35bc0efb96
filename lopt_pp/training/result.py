"""What comes of a run."""

from dataclasses import dataclass

from transformers.trainer_utils import TrainOutput


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

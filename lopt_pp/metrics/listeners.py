"""What is told of every step that all stages have reported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lopt_pp.metrics.records import Record

if TYPE_CHECKING:  # They bring accelerate with them, and whoever has no callbacks does without.
    from transformers import TrainerCallback, TrainerControl

    from lopt_pp.metrics.callbacks import Callbacks


class Listener(Protocol):
    """Is told of every step that all stages have reported, by rank 0, off the training path."""

    name: str
    """What it is called in a warning."""

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        """Takes the records of a step.

        Args:
            step: counted from 1; 0 is an evaluation before the first.
            records: of each stage, as `metrics.jsonl` has them.
            replicas: of each stage, those of its replicas, with their intervals.
        """

    def saved(self, step: int) -> None:
        """There is a checkpoint of this step, complete in the output directory. May come from another thread."""

    def end(self) -> None:
        """The run has come to its end, or was stopped."""


@dataclass(frozen=True)
class OwnCallbacks:
    """Callbacks of a user, for `lopt_pp.metrics.callbacks.Callbacks`.

    Attributes:
        callbacks: objects, or classes as transformers takes them, too.
        act: called with the step and their control where one of them asks for a stop, a checkpoint or an evaluation, in
            their thread.
        opened: called with what calls them before it does; its `state` is the `TrainerState` that they are given.
    """

    callbacks: "Sequence[TrainerCallback | type[TrainerCallback]]" = ()
    act: "Callable[[int, TrainerControl], None]" = lambda step, control: None
    opened: "Callable[[Callbacks], None]" = lambda callbacks: None

"""The part of a pipeline that one process holds: its stages, and their ends of the boundaries beside them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from lopt_pp.distributed.shutdown import NEVER_STOPS, StopSignal
from lopt_pp.metrics.clock import StageClock
from lopt_pp.pipeline.stream import Receiver, Sender
from lopt_pp.stage.base import BaseStage

AnyStage = TypeVar("AnyStage", bound=BaseStage, covariant=True)


@dataclass(frozen=True)
class Segment(Generic[AnyStage]):
    """The stages of one process, in order, each with its clock and its ends of the boundaries.

    Attributes:
        stages: likewise.
        receivers: by stage, the end of the boundary before it; none for the first stage of the model.
        senders: by stage, the end of the boundary after it; none for the last.
        stop_signal: says what this process makes.
        clocks: by stage.
    """

    stages: Sequence[AnyStage]
    receivers: Mapping[int, Receiver] = field(default_factory=dict)
    senders: Mapping[int, Sender] = field(default_factory=dict)
    stop_signal: StopSignal = NEVER_STOPS
    clocks: Mapping[int, StageClock] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "clocks", {stage.index: StageClock(stage.device) for stage in self.stages})

    def receive(self, stage: BaseStage) -> torch.Tensor | None:
        """What comes next from the stage before, `[sequences, tokens, hidden]`; None on the first stage."""
        with self.clocks[stage.index]("wait_receive"):
            return self.receivers[stage.index].receive() if stage.index in self.receivers else None

    def sender(self, stage: BaseStage) -> Callable[[torch.Tensor], None] | None:
        """What hands hidden states on to the stage after; None on the last stage."""
        if stage.index not in self.senders:
            return None

        def send(hidden_states: torch.Tensor) -> None:
            with self.clocks[stage.index]("wait_send"):
                self.senders[stage.index].send(hidden_states)

        return send

    def close(self) -> None:
        """Sees that everything has left, and that nothing more comes."""
        for sender in self.senders.values():
            sender.close()
        for receiver in self.receivers.values():
            receiver.close()

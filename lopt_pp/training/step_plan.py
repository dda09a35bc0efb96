"""The plan of a step: which messages cross a boundary, in which order, and what is done with them.

A step has phases: its microbatches, then maybe the drift probe, then maybe the held-out rows. Their order is written
once, in the plan. The loop runs the phases, and the streams derive from the same phases what to announce and what to
expect. So the two cannot disagree, and what else is to cross a boundary is one more phase.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

from lopt_pp.data import MicrobatchSampler, UnusableRowsError
from lopt_pp.metrics.records import Record
from lopt_pp.metrics.state import Activity
from lopt_pp.pipeline.messages import Header, dtype_code
from lopt_pp.stage.base import BaseStage
from lopt_pp.stage.stage import Stage
from lopt_pp.training.segment import Segment

START = -1
"""The step before the first, where a run is evaluated at its start. It has no microbatches, and changes nothing."""


AnyStage = TypeVar("AnyStage", bound=BaseStage, contravariant=True)


class Phase(Protocol[AnyStage]):
    """A part of a step, in which all stages exchange the same messages in the same order.

    Attributes:
        activity: what a run does in it, in the words of its state.
    """

    activity: ClassVar[Activity]

    def is_due(self, step: int) -> bool:
        """Whether a step has this phase; a function of the step's number (from 0, or `START`) alone."""

    def shapes(self, step: int, boundary: int) -> Sequence[tuple[int, int]] | None:
        """The (sequences, tokens) of each message that crosses a boundary, as both of its ends know them.

        Args:
            step: that has this phase.
            boundary: the stage that sends.

        Returns:
            The messages' shapes; None while they are not known. They must be when `run` begins, in the process that
            sends and in the one that receives.
        """

    def may_end_early(self, step: int) -> bool:
        """Whether a run that is asked to stop may do so before any message of this phase; otherwise it makes all."""

    def run(self, step: int, segment: Segment[AnyStage]) -> dict[int, Record]:
        """Does this process's part.

        Returns:
            By stage, what goes into the step's record.
        """


class StepPlan(Generic[AnyStage]):
    """The phases of every step of a run, in order; the same in every process.

    Args:
        sampler: of the training rows.
        phases: in the order in which a step has them.
    """

    def __init__(self, sampler: MicrobatchSampler, phases: Sequence[Phase[AnyStage]]) -> None:
        self.sampler = sampler
        self._phases = phases

    def unusable(self, step: int) -> UnusableRowsError | None:
        """Why a step cannot be made; None where it can. The run ends before it then, in every process."""
        return self.sampler.unusable(step) if step != START else None

    def phases(self, step: int) -> Iterator[Phase[AnyStage]]:
        """Those that a step has."""
        return (phase for phase in self._phases if phase.is_due(step))

    def headers(self, steps: Iterable[int], stage: Stage, boundary: int) -> Iterator[Header | None]:
        """What crosses a boundary in some steps, message by message, as either end derives it.

        Args:
            steps: of the run.
            stage: at one end of the boundary.
            boundary: the stage that sends.

        Returns:
            The headers; None as often as the next one is asked for while its shape is not known.
        """
        hidden_size, dtype = stage.block.model.config.hidden_size, dtype_code(stage.dtype)
        for step in itertools.takewhile(lambda step: self.unusable(step) is None, steps):
            message = 0
            for phase in self.phases(step):
                while (shapes := phase.shapes(step, boundary)) is None:
                    yield None
                may_end_early = phase.may_end_early(step)
                for number, (sequences, tokens) in enumerate(shapes, 1):
                    held_out = number if may_end_early else 0
                    yield Header(step, message, sequences, tokens, hidden_size, dtype, held_out)
                    message += 1

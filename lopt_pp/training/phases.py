"""The phases of a step of training: its microbatches, the drift probe, and the held-out rows."""

import contextlib
import logging
import operator
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch

from lopt_pp.data import Microbatch, MicrobatchesAhead, MicrobatchSampler
from lopt_pp.distributed.shutdown import StopSignal
from lopt_pp.metrics.drift import Probe
from lopt_pp.metrics.progress import EVALUATING
from lopt_pp.metrics.records import Record
from lopt_pp.metrics.state import Activity
from lopt_pp.stage.base import BaseStage, Clock
from lopt_pp.stage.end_to_end_stage import EndToEndStage
from lopt_pp.stage.stage import Stage
from lopt_pp.training.held_out import Evaluation
from lopt_pp.training.segment import Segment
from lopt_pp.training.step_plan import START
from lopt_pp.training.token_metrics import TokenMeter, TokenMetrics

logger = logging.getLogger(__name__)

_NAMED_STEPS = 3
"""Steps without a target token whose rows are named."""


class _OnTrainingRows:
    """What phases have in common that train on the rows of a step.

    Args:
        sampler: of the training rows.
        ahead: makes their microbatches; the sampler itself where it is not given.
    """

    activity: ClassVar[Activity] = "training"

    def __init__(self, sampler: MicrobatchSampler, ahead: MicrobatchesAhead | None = None) -> None:
        self._sampler = sampler
        self._made = sampler if ahead is None else ahead
        self._num_untargeted = 0

    def is_due(self, step: int) -> bool:
        return step != START

    def may_end_early(self, step: int) -> bool:
        return False

    def _tell_of_no_target(self, step: int, stage: int) -> None:
        """Says which rows have left nothing to predict in a step; in one process of the run, and a few times."""
        if stage == 0 and self._sampler.replica == 0 and self._num_untargeted <= _NAMED_STEPS:
            self._num_untargeted += 1
            if self._num_untargeted > _NAMED_STEPS:
                logger.warning("further steps have no target token, and no loss; their rows are not named")
                return
            why = f": {rows}" if (rows := self._sampler.left_out(step)) else ""
            logger.warning("step %d has no target token, and so no loss%s", step + 1, why)


class _OnHeldOutRows:
    """What phases have in common that measure on the held-out rows.

    Args:
        evaluation: the rows, and after which steps they are run.
        metrics: what is measured of single tokens; None for nothing.
    """

    activity: ClassVar[Activity] = "evaluating"

    def __init__(self, evaluation: Evaluation, metrics: TokenMetrics | None = None) -> None:
        self._evaluation, self._metrics = evaluation, metrics
        self._is_whole = False

    def is_due(self, step: int) -> bool:
        return self._evaluation.is_due(step + 1)

    def may_end_early(self, step: int) -> bool:
        return self._evaluation.may_end_early(step + 1)

    def _microbatches(self, step: int, stop_signal: StopSignal) -> Iterator[Microbatch]:
        """This replica's microbatches, as far as the run makes them; `_is_whole` says then whether these were all."""
        self._is_whole = False
        with EVALUATING:
            for number, batch in enumerate(self._evaluation.microbatches(), 1):
                if self.may_end_early(step) and not stop_signal.runs(step, number):
                    return
                yield batch
                EVALUATING.done(number, len(self._evaluation.shapes))
        self._is_whole = True

    def _meter(self, stage: BaseStage) -> TokenMeter | None:
        """What measures tokens on the last stage, where anything is to be measured of them."""
        return TokenMeter(self._metrics) if self._metrics is not None and stage.block.spec.is_last else None


class LocalTraining(_OnTrainingRows):
    """The microbatches of a step: each goes forward through the stages, and backward within each of them."""

    def shapes(self, step: int, boundary: int) -> Sequence[tuple[int, int]]:
        return self._sampler.shapes(step)

    def run(self, step: int, segment: Segment[Stage]) -> dict[int, Record]:
        batches = self._made.microbatches(step)
        # Which of them a stage learns from, and how many tokens its loss counts in these.
        learned = {stage.index: stage.learned_microbatches(step, len(batches)) for stage in segment.stages}
        counts = {
            stage.index: stage.count(self._sampler.counts(step, learned[stage.index]))
            for stage in segment.stages
            if learned[stage.index]
        }
        for stage in segment.stages:
            stage.begin_step(self._sampler.microbatches_with_rows(step, learned[stage.index]))
        for number, host_batch in enumerate(batches):
            for stage in segment.stages:
                own = learned[stage.index]
                stage.run_microbatch(
                    host_batch.to(stage.device),
                    segment.receive(stage),
                    segment.sender(stage),
                    step_count=counts[stage.index] if number in own else None,
                    is_last=bool(own) and number == own[-1],
                    clock=segment.clocks[stage.index],
                )
        records: dict[int, Record] = {}
        for stage in segment.stages:
            with segment.clocks[stage.index]("optimizer"):
                measured = stage.token_record(counts.get(stage.index, 0))
                records[stage.index] = stage.step(step) | measured | stage.router_record() | token_counts(batches)
            if counts.get(stage.index) == 0 and stage.objective is not None:
                del records[stage.index][stage.objective.name]  # It is of nothing, and no 0.
        if self._sampler.counts(step).num_targets == 0:
            self._tell_of_no_target(step, segment.stages[0].index)
        return records


class DriftProbe:
    """Measures the drift of the boundaries; a stage whose boundary has drifted too far learns no more.

    Args:
        probe: its rows, and what the pretrained blocks made of them.
        limit: of `drift_norm`.
    """

    activity: ClassVar[Activity] = "training"

    def __init__(self, probe: Probe, limit: float) -> None:
        self._probe, self._limit = probe, limit

    def is_due(self, step: int) -> bool:
        return step != START and self._probe.is_due(step)

    def may_end_early(self, step: int) -> bool:
        return False  # It decides whether a stage goes on learning.

    def shapes(self, step: int, boundary: int) -> Sequence[tuple[int, int]]:
        return [self._probe.shape] if self._probe.is_sent_by(boundary) else []

    def run(self, step: int, segment: Segment[Stage]) -> dict[int, Record]:
        records: dict[int, Record] = {}
        for stage in segment.stages:
            if not self._probe.measures(stage):
                continue
            received = segment.receive(stage)
            with segment.clocks[stage.index]("probe"):
                outputs, record = self._probe.measure(stage, received)
            if (send := segment.sender(stage)) is not None and self._probe.is_sent_by(stage.index):
                send(outputs)
            self._freeze_drifting(stage, record["drift_norm"], step)
            records[stage.index] = record
        return records

    def _freeze_drifting(self, stage: Stage, drift: float, step: int) -> None:
        """Ends a stage's learning where its boundary has drifted too far. All its replicas measure the same."""
        if stage.learns and drift > self._limit:
            stage.freeze()
            logger.warning(
                "stage %d has stopped learning after step %d: its boundary's drift is %.3g, above "
                "--max_interface_drift %g. It only runs forward now",
                stage.index,
                step + 1,
                drift,
                self._limit,
            )


class HeldOutRows(_OnHeldOutRows):
    """The held-out rows: forward only, as further microbatches of the step."""

    def shapes(self, step: int, boundary: int) -> Sequence[tuple[int, int]]:
        return self._evaluation.shapes

    def run(self, step: int, segment: Segment[Stage]) -> dict[int, Record]:
        """Runs the rows through the stages, which are as they were afterwards.

        Returns:
            By stage, this replica's share of the mean loss over each set of rows, under the loss's name with the set's
            prefix before it, and of what is measured of single tokens; nothing of a stage that has no loss, or where
            the run was stopped meanwhile.
        """
        losses: dict[int, list[torch.Tensor]] = {stage.index: [] for stage in segment.stages}
        last = segment.stages[-1]
        meter = self._meter(last)
        with contextlib.ExitStack() as stack:
            for stage in segment.stages:
                measure = meter.measure if meter is not None and stage is last else None
                stack.enter_context(stage.evaluating(measure))
            for host_batch in self._microbatches(step, segment.stop_signal):
                for stage in segment.stages:
                    loss = stage.run_microbatch(
                        host_batch.to(stage.device),
                        segment.receive(stage),
                        segment.sender(stage),
                        clock=_all_as_evaluation(segment.clocks[stage.index]),
                    )
                    if loss is not None:
                        losses[stage.index].append(loss)
        if not self._is_whole:
            return {}
        records = {
            stage.index: self._evaluation.mean_losses(stage.objective.name, losses[stage.index], stage.count)
            for stage in segment.stages
            if stage.objective is not None
        }
        if meter is not None:
            with segment.clocks[last.index]("eval"):
                records[last.index] |= meter.values(self._evaluation, last.replicas)
        return records


class EndToEndTraining(_OnTrainingRows):
    """The microbatches of a step where the gradient of the task loss goes back through all blocks.

    PyTorch's schedule sends and receives by itself, in an order of its own.
    """

    def shapes(self, step: int, boundary: int) -> Sequence[tuple[int, int]]:
        return []

    def run(self, step: int, segment: Segment[EndToEndStage]) -> dict[int, Record]:
        (stage,) = segment.stages
        batches, count = self._made.microbatches(step), self._sampler.counts(step).num_targets
        stage.begin_step(self._sampler.microbatches_with_rows(step))
        record = stage.train_step(step, batches, count, segment.clocks[stage.index])
        if count == 0:
            record.pop("loss", None)
            self._tell_of_no_target(step, stage.index)
        return {stage.index: record | stage.token_record(count) | token_counts(batches)}


class EndToEndHeldOutRows(_OnHeldOutRows):
    """The held-out rows in an end-to-end run."""

    def shapes(self, step: int, boundary: int) -> Sequence[tuple[int, int]]:
        return []

    def run(self, step: int, segment: Segment[EndToEndStage]) -> dict[int, Record]:
        (stage,) = segment.stages
        with segment.clocks[stage.index]("eval"):
            meter = self._meter(stage)
            measure = None if meter is None else meter.measure
            losses = stage.evaluate(self._microbatches(step, segment.stop_signal), measure)
            if not (losses and self._is_whole):
                return {}
            count = operator.attrgetter("num_targets")
            means = self._evaluation.mean_losses("loss", losses, count)
            return {stage.index: means | ({} if meter is None else meter.values(self._evaluation, stage.replicas))}


def _all_as_evaluation(clock: Clock) -> Clock:
    """A clock that takes all phases of a microbatch for `eval`."""
    return lambda phase: clock("eval")


def token_counts(batches: Sequence[Microbatch]) -> Record:
    """How many tokens a replica's part of a step has: all real ones, and those with a loss."""
    return {name: sum(getattr(batch, name) for batch in batches) for name in ("num_tokens", "num_targets")}

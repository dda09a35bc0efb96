"""The training loop of one process: data -> receive -> forward -> send -> local loss -> backward -> step.

The same loop runs in every process, over the stages that it holds. It waits for nobody but the neighbour before it (for
the next hidden states) and, when the queue is full, the neighbour after it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from lopt_pp.data import Microbatch, MicrobatchSampler, TokenCounts
from lopt_pp.metrics.clock import StageClock, peak_memory
from lopt_pp.metrics.drift import Probe
from lopt_pp.metrics.records import Record
from lopt_pp.pipeline.stream import Receiver, Sender
from lopt_pp.stage.stage import Stage
from lopt_pp.training.held_out import START, Evaluation, evaluate

logger = logging.getLogger(__name__)


def train(
    stages: Sequence[Stage],
    receivers: Mapping[int, Receiver],
    senders: Mapping[int, Sender],
    sampler: MicrobatchSampler,
    steps: Iterable[int],
    report: Callable[[Record], None],
    after_step: Callable[[int], None] = lambda steps_done: None,
    probe: Probe | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Trains the stages of this process for some optimizer steps.

    Args:
        stages: in order.
        receivers: by stage, the end of the boundary before it; none for the first stage of the model.
        senders: by stage, the end of the boundary after it; none for the last.
        sampler: of the data, the same in every process.
        steps: of the run, to make; may end early. The first may be `START`, of which there is only the evaluation.
        report: called with one record per step and stage, see `docs/metrics.md`.
        after_step: called with the number of steps done, when all stages of this process have made the step.
        probe: measures how far the hidden states that are sent have drifted; None does not.
        evaluation: rows to measure the stages on between steps; the same in every process.

    Raises:
        NotFiniteError: a stage's loss or gradient is not finite; its weights are those of the last good step.
        StreamError: a neighbour is gone, or disagrees.
    """
    clocks = {stage.index: StageClock(stage.device) for stage in stages}
    for step in steps:
        batches: Sequence[Microbatch] = ()
        records: dict[int, Record] = {stage.index: {} for stage in stages}
        if step != START:
            batches = sampler.microbatches(step)
            learned = {stage.index: stage.learned_microbatches(step, len(batches)) for stage in stages}
            counts = {index: sampler.counts(step, indices) for index, indices in learned.items()}
            _run_microbatches(stages, receivers, senders, clocks, batches, learned, counts)
            for stage in stages:
                clock = clocks[stage.index]
                with clock("optimizer"):
                    records[stage.index] |= stage.step(step)
                if probe is not None and probe.is_due(step):
                    drift = probe.measure(stage, receivers.get(stage.index), senders.get(stage.index), clock)
                    records[stage.index] |= drift
                    _stop_drifting(stage, drift, probe.limit, step)
        if evaluation is not None and evaluation.is_due(step + 1):
            for index, losses in evaluate(stages, receivers, senders, clocks, evaluation).items():
                records[index] |= losses
        for stage in stages:
            record = records[stage.index] | clocks[stage.index].read()
            record |= {"step": step + 1, "stage": stage.index, "epoch": sampler.epoch(step)}
            record |= token_counts(batches) | {"peak_memory_bytes": peak_memory(stage.device)}
            report(record)
        if step != START:
            after_step(step + 1)
    for sender in senders.values():
        sender.close()
    for receiver in receivers.values():
        receiver.close()


def _run_microbatches(
    stages: Sequence[Stage],
    receivers: Mapping[int, Receiver],
    senders: Mapping[int, Sender],
    clocks: Mapping[int, StageClock],
    batches: Sequence[Microbatch],
    learned: Mapping[int, Sequence[int]],
    counts: Mapping[int, TokenCounts],
) -> None:
    """Leaves the stages with the gradients of a step: each microbatch goes forward, and back within each stage.

    Args:
        stages, receivers, senders: as above.
        clocks: by stage.
        batches: of the step.
        learned: by stage, the places of those that it learns from.
        counts: by stage, the tokens of these, over all replicas.
    """
    for index, host_batch in enumerate(batches):
        for stage in stages:
            clock, batch, indices = clocks[stage.index], host_batch.to(stage.device), learned[stage.index]
            learns = index in indices
            with clock("wait_receive"):
                hidden_states = receivers[stage.index].receive() if stage.index in receivers else None
            with stage.accumulating(is_last=learns and index == indices[-1]):
                with clock("forward"):
                    output = stage.forward(batch, hidden_states, learns)
                if stage.index in senders:
                    with clock("wait_send"):
                        senders[stage.index].send(stage.outgoing(output))
                if learns:
                    with clock("forward"):
                        loss = stage.loss(output, batch, stage.count(counts[stage.index]))
                    with clock("backward"):
                        loss.backward()
                    del loss
            del output, hidden_states


def _stop_drifting(stage: Stage, record: Record, limit: float, step: int) -> None:
    """Ends a stage's learning where its boundary has drifted too far. All its replicas measure the same."""
    if stage.learns and record.get("drift_norm", 0.0) > limit:
        stage.freeze()
        logger.warning(
            "stage %d has stopped learning after step %d: its boundary's drift is %.3g, above --max_interface_drift "
            "%g. It only runs forward now",
            stage.index,
            step + 1,
            record["drift_norm"],
            limit,
        )


def token_counts(batches: Sequence[Microbatch]) -> Record:
    """How many tokens a replica's part of a step has: all real ones, and those with a loss."""
    return {name: sum(getattr(batch, name) for batch in batches) for name in ("num_tokens", "num_targets")}

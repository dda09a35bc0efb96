"""Measures the losses on held-out rows while a run goes on: forward only, one way, without a barrier.

At an evaluation step every stage makes its optimizer step, and then runs the held-out rows forward before its next one.
Their hidden states are further messages of that step on the same stream. So each stage measures what the sequential
algorithm has after that step, waits for nobody longer than the forward passes take, and trains on with the same bits.

The evaluation before the first step is that of a step before it, `START`, which trains nothing: its messages are the
held-out rows' alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch

from lopt_pp.data import Microbatch, MicrobatchSampler, TokenCounts, TokenizedRows
from lopt_pp.metrics.clock import StageClock
from lopt_pp.metrics.records import Record
from lopt_pp.pipeline.stream import Receiver, Sender
from lopt_pp.stage.stage import Stage

START = -1
"""The step before the first, where a run is evaluated at its start. It has no microbatches, and changes nothing."""


class Evaluation:
    """The held-out rows as microbatches, and the steps after which they are run. The same in every process.

    Args:
        rows: that are not trained on.
        eval_steps: steps between evaluations; 0 for the last step only.
        num_steps: of the run.
        on_start: whether they are run before the first step, too.
        per_device_eval_batch_size: rows of a microbatch.
        pad_token_id: the id that pads them.
        replica: whose microbatches these are.
        num_replicas: that share the rows.

    Attributes:
        counts: tokens of all the rows, over all replicas.
        shapes: the (rows, tokens) of each of this replica's microbatches.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        eval_steps: int,
        num_steps: int,
        per_device_eval_batch_size: int,
        pad_token_id: int,
        on_start: bool = False,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self._eval_steps = eval_steps
        self._num_steps = num_steps
        self._on_start = on_start
        # One pass, in the order of the file. A step of this order is one microbatch of each replica.
        self._sampler = MicrobatchSampler(
            rows,
            per_device_train_batch_size=per_device_eval_batch_size,
            gradient_accumulation_steps=1,
            shuffle=False,
            seed=0,
            pad_token_id=pad_token_id,
            replica=replica,
            num_replicas=num_replicas,
            sampling="random",
        )
        parts = range(self._sampler.steps_per_epoch)
        counts = [self._sampler.counts(part) for part in parts]
        self.counts = TokenCounts(sum(part.num_tokens for part in counts), sum(part.num_targets for part in counts))
        self.shapes = [shape for part in parts for shape in self._sampler.shapes(part)]

    def is_due(self, steps_done: int) -> bool:
        """Whether the rows are run when `steps_done` steps are done; 0 are after `START`."""
        if steps_done == 0:
            return self._on_start
        return steps_done == self._num_steps or (self._eval_steps > 0 and steps_done % self._eval_steps == 0)

    def microbatches(self) -> Iterator[Microbatch]:
        """This replica's microbatches, one after another, on the CPU."""
        for part in range(self._sampler.steps_per_epoch):
            yield from self._sampler.microbatches(part)


def evaluate(
    stages: Sequence[Stage],
    receivers: Mapping[int, Receiver],
    senders: Mapping[int, Sender],
    clocks: Mapping[int, StageClock],
    evaluation: Evaluation,
) -> dict[int, Record]:
    """Runs the held-out rows through the stages of this process, forward only.

    Args:
        stages: in order; they are as they were afterwards.
        receivers: by stage, the end of the boundary before it.
        senders: by stage, the end of the boundary after it.
        clocks: by stage.
        evaluation: the rows.

    Returns:
        By stage, this replica's share of the mean loss over the rows, under the loss's name with `eval_` before it;
        nothing of a stage that has no loss.
    """
    losses: dict[int, list[torch.Tensor]] = {stage.index: [] for stage in stages}
    with ExitStack() as stack:
        for stage in stages:
            stack.enter_context(stage.evaluating())
        for host_batch in evaluation.microbatches():
            for stage in stages:
                clock, batch = clocks[stage.index], host_batch.to(stage.device)
                with clock("wait_receive"):
                    hidden_states = receivers[stage.index].receive() if stage.index in receivers else None
                with clock("eval"):
                    output = stage.forward(batch, hidden_states)
                if stage.index in senders:
                    with clock("wait_send"):
                        senders[stage.index].send(stage.outgoing(output))
                if stage.objective is not None:
                    with clock("eval"):
                        losses[stage.index].append(stage.summed_loss(output, batch))
                del output, hidden_states
    return {
        stage.index: {f"eval_{stage.objective.name}": mean_loss(losses[stage.index], stage.count(evaluation.counts))}
        for stage in stages
        if stage.objective is not None
    }


def mean_loss(sums: Sequence[torch.Tensor], count: int) -> float:
    """The mean loss of microbatches, from their sums: added up in float64, since there may be many."""
    return torch.stack(list(sums)).double().sum().item() / max(count, 1)

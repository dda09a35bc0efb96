"""Measures the losses on held-out rows while a run goes on: forward only, one way, without a barrier.

At an evaluation step every stage makes its optimizer step, and then runs the held-out rows forward before its next one.
Their hidden states are further messages of that step on the same stream. So each stage measures what the sequential
algorithm has after that step, waits for nobody longer than the forward passes take, and trains on with the same bits.

The evaluation before the first step is that of a step before it, `START`, which trains nothing: its messages are the
held-out rows' alone. `lopt_pp.training.phases` runs them.
"""

from collections.abc import Iterator, Sequence

import torch

from lopt_pp.data import Microbatch, MicrobatchSampler, TokenCounts, TokenizedRows
from lopt_pp.distributed.shutdown import EVALUATE, RunLength


class Evaluation:
    """The held-out rows as microbatches, and the steps after which they are run. The same in every process.

    Args:
        rows: that are not trained on.
        eval_steps: steps between evaluations; 0 for the last step only.
        length: of the run.
        on_start: whether they are run before the first step, too.
        chooses: whether the losses say which model is the result.
        per_device_eval_batch_size: rows of a microbatch.
        pad_token_id: the id that pads them.
        replica: whose microbatches these are.
        num_replicas: that share the rows.

    Attributes:
        counts: tokens of all the rows, over all replicas.
        shapes: the (sequences, tokens) of each of this replica's microbatches.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        eval_steps: int,
        length: RunLength,
        per_device_eval_batch_size: int,
        pad_token_id: int,
        on_start: bool = False,
        chooses: bool = False,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self._eval_steps = eval_steps
        self._length = length
        self._on_start = on_start
        self._chooses = chooses
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
        if self._length.besides(steps_done - 1) & EVALUATE:
            return True
        return self._length.is_last(steps_done) or (self._eval_steps > 0 and steps_done % self._eval_steps == 0)

    def may_end_early(self, steps_done: int) -> bool:
        """Whether a run that is asked to stop leaves off: where its result depends on the loss, it does not."""
        return steps_done == 0 or (not self._length.is_last(steps_done) and not self._chooses)

    def microbatches(self) -> Iterator[Microbatch]:
        """This replica's microbatches, one after another, on the CPU."""
        for part in range(self._sampler.steps_per_epoch):
            yield from self._sampler.microbatches(part)


def mean_loss(sums: Sequence[torch.Tensor], count: int) -> float:
    """The mean loss of microbatches, from their sums: added up in float64, since there may be many."""
    return torch.stack(list(sums)).double().sum().item() / max(count, 1)

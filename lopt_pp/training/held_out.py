"""Measures the losses on held-out rows while a run goes on: forward only, one way, without a barrier.

At an evaluation step every stage makes its optimizer step, and then runs the held-out rows forward before its next one.
Their hidden states are further messages of that step on the same stream. So each stage measures what the sequential
algorithm has after that step, waits for nobody longer than the forward passes take, and trains on with the same bits.

The evaluation before the first step is that of a step before it, `START`, which trains nothing: its messages are the
held-out rows' alone. `lopt_pp.training.phases` runs them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lopt_pp.config.evaluation import eval_prefix
from lopt_pp.data import Microbatch, MicrobatchSampler, TokenCounts, TokenizedRows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.distributed.shutdown import EVALUATE, RunLength
from lopt_pp.metrics.records import Record


@dataclass(frozen=True)
class EvaluationPart:
    """A set of held-out rows as microbatches.

    Attributes:
        prefix: what the names of its values begin with, such as `eval_`.
        rows: likewise. The microbatches of all replicas have them in their order, turn and turn about.
        rows_per_microbatch: but for the last.
        sampler: gives a microbatch of each replica as one "step" of its order; there is one pass, in the file's order.
        counts: tokens of all its rows, over all replicas.
    """

    prefix: str
    rows: TokenizedRows
    rows_per_microbatch: int
    sampler: MicrobatchSampler
    counts: TokenCounts

    @property
    def num_microbatches(self) -> int:
        """Of each replica."""
        return self.sampler.steps_per_epoch


class Evaluation:
    """The held-out rows as microbatches, and the steps after which they are run. The same in every process.

    Args:
        sets: of rows that are not trained on.
        eval_steps: steps between evaluations; 0 for the last step only.
        first_step: the steps that are done before the first evaluation, but for one at the start or the last step.
        length: of the run.
        on_start: whether they are run before the first step, too.
        chooses: whether the result of the run depends on what is measured.
        per_device_eval_batch_size: rows of a microbatch.
        pad_token_id: the id that pads them.
        replica: whose microbatches these are.
        num_replicas: that share the rows.

    Attributes:
        parts: the sets, in the order in which they are run.
        shapes: the (sequences, tokens) of each of this replica's microbatches.
    """

    def __init__(
        self,
        sets: EvaluationSets,
        *,
        eval_steps: int,
        length: RunLength,
        per_device_eval_batch_size: int,
        pad_token_id: int,
        first_step: int = 0,
        on_start: bool = False,
        chooses: bool = False,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self._eval_steps, self._first_step = eval_steps, first_step
        self._length = length
        self._on_start = on_start
        self._chooses = chooses
        parts, self.shapes = [], list[tuple[int, int]]()
        for name, rows in sets.rows.items():
            sampler = MicrobatchSampler(
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
            numbers = range(sampler.steps_per_epoch)
            counts = [sampler.counts(number) for number in numbers]
            total = TokenCounts(sum(part.num_tokens for part in counts), sum(part.num_targets for part in counts))
            parts.append(EvaluationPart(eval_prefix(name), rows, per_device_eval_batch_size, sampler, total))
            self.shapes += [shape for number in numbers for shape in sampler.shapes(number)]
        self.parts = tuple(parts)

    def is_due(self, steps_done: int) -> bool:
        """Whether the rows are run when `steps_done` steps are done; 0 are after `START`."""
        if steps_done == 0:
            return self._on_start
        if self._length.besides(steps_done - 1) & EVALUATE:
            return True
        in_turn = self._eval_steps > 0 and steps_done % self._eval_steps == 0 and steps_done >= self._first_step
        return in_turn or self._length.is_last(steps_done)

    def may_end_early(self, steps_done: int) -> bool:
        """Whether a run that is asked to stop leaves off: where its result depends on the loss, it does not."""
        return steps_done == 0 or (not self._length.is_last(steps_done) and not self._chooses)

    def microbatches(self) -> Iterator[Microbatch]:
        """This replica's microbatches, one set after another, on the CPU."""
        for part in self.parts:
            for number in range(part.num_microbatches):
                yield from part.sampler.microbatches(number)

    def mean_losses(self, name: str, sums: Sequence[torch.Tensor], count: Callable[[TokenCounts], int]) -> Record:
        """This replica's share of the mean loss of each set, by its name in records.

        Args:
            name: of the loss.
            sums: the loss of each of the replica's microbatches, summed over the tokens that count: float32 scalars.
            count: of a set's tokens, the number that the loss counts.
        """
        losses, rest = Record(), iter(sums)
        for part in self.parts:
            own = [next(rest) for _ in range(part.num_microbatches)]
            losses[f"{part.prefix}{name}"] = mean_loss(own, count(part.counts))
        return losses


def mean_loss(sums: Sequence[torch.Tensor], count: int) -> float:
    """The mean loss of microbatches, from their sums: added up in float64, since there may be many."""
    return torch.stack(list(sums)).double().sum().item() / max(count, 1)

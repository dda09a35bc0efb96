"""Which rows each optimizer step takes, as a function of the step's number alone."""

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from lopt_pp.data.dataset import Pack, Rows, UnusableRowsError
from lopt_pp.data.microbatch import Microbatch, collate
from lopt_pp.errors import LoptError

_KEPT_STEPS = 64
"""More than the headers of a stream usually run ahead of the training."""


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens a step has, over all replicas.

    Attributes:
        num_tokens: real tokens, without padding.
        num_targets: tokens with a loss.
    """

    num_tokens: int
    num_targets: int


class MicrobatchSampler:
    """The microbatches of every optimizer step, with random access.

    It keeps no position: each process derives the same order for itself, and a resumed run goes on where it stopped by
    asking for its next step. Every epoch is a permutation of all rows (or packs of rows), cut into steps of
    `per_device_train_batch_size * gradient_accumulation_steps * num_replicas` rows and these into microbatches of
    `per_device_train_batch_size` rows, which the replicas take in turn. What is left at the end of an epoch makes a
    smaller step: no row is left out or seen twice. Steps go on over the epochs without end.

    Every replica has the same number of microbatches in a step, since each takes part in what the replicas do together.
    One for which no rows are left gets a microbatch of one padding token, which counts nothing.

    Args:
        rows: the rows to train on.
        per_device_train_batch_size: rows of a microbatch.
        gradient_accumulation_steps: microbatches of a step.
        shuffle: whether each epoch has its own permutation; otherwise the rows keep their order.
        seed: what the permutations are drawn from, 0 or more.
        pad_token_id: the id that pads `input_ids`.
        replica: whose microbatches these are, from 0.
        num_replicas: that share a step's rows.
        sampling: `random` leaves the rows of a step as they come; `batch_rebalance` puts the longest first, so that
            those of a microbatch are of similar length and little is padded; `group_by_length` also draws the rows of a
            microbatch from among those of similar length of many steps (it needs `rows.lengths`).
        keep_apart: whether rows of the data may share a sequence of a microbatch; see `Microbatch.position_ids`.
        padding_free: whether all rows of a microbatch share one sequence.
        drop_last: whether rows at the end of an epoch that fill no microbatch of all replicas are left out, as
            `transformers` does with `dataloader_drop_last`.

    Raises:
        LoptError: that would be all rows.

    Attributes:
        replica: see above.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        per_device_train_batch_size: int,
        gradient_accumulation_steps: int,
        shuffle: bool,
        seed: int,
        pad_token_id: int,
        replica: int = 0,
        num_replicas: int = 1,
        sampling: Literal["random", "batch_rebalance", "group_by_length"] = "batch_rebalance",
        keep_apart: bool = False,
        padding_free: bool = False,
        drop_last: bool = False,
    ) -> None:
        self._rows = rows
        self._batch_size = per_device_train_batch_size
        sequences = per_device_train_batch_size * gradient_accumulation_steps * num_replicas
        self._rows_per_step = max(1, int(sequences * rows.rows_per_pack))
        self.replica = replica
        self._num_replicas = num_replicas
        self._shuffle = shuffle
        self._seed = seed
        self._pad_token_id = pad_token_id
        self._sampling = sampling
        self._keep_apart = keep_apart or padding_free
        self._padding_free = padding_free
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()
        self._steps: OrderedDict[int, list[Pack]] = OrderedDict()
        self._unusable: dict[int, UnusableRowsError] = {}
        # The next step's microbatches may be made in another thread than the one that asks for shapes and counts.
        self._lock = threading.RLock()
        unit = max(1, int(per_device_train_batch_size * num_replicas * rows.rows_per_pack)) if drop_last else 1
        self._rows_per_epoch = len(rows) // unit * unit
        if self._rows_per_epoch == 0:
            raise LoptError(
                f"--dataloader_drop_last leaves none of the {len(rows)} rows of {rows.source}: a microbatch of all "
                f"replicas has {unit}; leave it out, or lower --per_device_train_batch_size"
            )
        self.steps_per_epoch = math.ceil(self._rows_per_epoch / self._rows_per_step)

    def epoch(self, step: int) -> float:
        """The epochs that have passed when the step `step` is done, for logs (as `transformers` counts them)."""
        return (step + 1) / self.steps_per_epoch

    def counts(self, step: int, indices: Collection[int] | None = None) -> TokenCounts:
        """The tokens of a step, over all replicas.

        Args:
            step: the optimizer step.
            indices: the microbatches that count, by their place in each replica's part of the step, from 0; None for
                all.
        """
        packs = self._chosen(step, indices)
        return TokenCounts(sum(pack.num_tokens for pack in packs), sum(pack.num_targets for pack in packs))

    def microbatches_with_rows(self, step: int, indices: Collection[int] | None = None) -> float:
        """The number of a replica's microbatches in a step that have rows, in the mean; `indices` as for `counts`."""
        return math.ceil(len(self._chosen(step, indices)) / self._batch_size) / self._num_replicas

    def left_out(self, step: int) -> str:
        """Why rows of a step are left out of it, which is smaller then, or has no rows at all; empty where none are."""
        self._packs_of(step)
        return self._rows.left_out(self._numbers_of(step))

    def unusable(self, step: int) -> UnusableRowsError | None:
        """Why a step cannot be made; None where its rows can be used. What has been answered stays so."""
        with self._lock:
            if step not in self._unusable:
                try:
                    self._packs_of(step)
                except UnusableRowsError as error:
                    self._unusable[step] = error
            return self._unusable.get(step)

    def shapes(self, step: int) -> list[tuple[int, int]]:
        """The (sequences, tokens) of each of the replica's microbatches of a step."""
        shapes = []
        for _, packs in self._microbatch_packs(step):
            lengths = [pack.num_tokens for pack in packs] or [1]
            shapes.append((1, sum(lengths)) if self._padding_free else (len(lengths), max(lengths)))
        return shapes

    def microbatches(self, step: int) -> list[Microbatch]:
        """The replica's microbatches of a step, on the CPU."""
        made = []
        for index, packs in self._microbatch_packs(step):
            rows = [pack.read() for pack in packs]
            if self._padding_free and rows:
                rows = [[row for pack in rows for row in pack]]
            made.append(collate(rows, step, index, self._pad_token_id, self._keep_apart))
        return made

    def _chosen(self, step: int, indices: Collection[int] | None) -> list[Pack]:
        """The rows of a step, over all replicas, in the order of its microbatches; of some of these alone."""
        packs, taken = self._packs_of(step), self._batch_size * self._num_replicas
        if indices is None:
            return packs
        return [pack for index in indices for pack in packs[index * taken : (index + 1) * taken]]

    def _microbatch_packs(self, step: int) -> Iterator[tuple[int, Sequence[Pack]]]:
        """The index and the rows of each of the replica's microbatches of a step."""
        packs = self._packs_of(step)
        taken = self._batch_size * self._num_replicas
        for index in range(max(1, math.ceil(len(packs) / taken))):
            index = index * self._num_replicas + self.replica
            yield index, packs[index * self._batch_size : (index + 1) * self._batch_size]

    def _packs_of(self, step: int) -> list[Pack]:
        """The rows of a step, over all replicas, in the order of its microbatches. They are asked for often."""
        with self._lock:
            if step not in self._steps:
                packs = self._rows.fetch(self._numbers_of(step))
                if self._sampling != "random" and not self._padding_free:
                    packs.sort(key=lambda pack: -pack.num_tokens)
                self._steps[step] = packs
                if len(self._steps) > _KEPT_STEPS:
                    self._steps.popitem(last=False)
                if step + 1 not in self._steps:
                    self._rows.prefetch(self._numbers_of(step + 1))
            return self._steps[step]

    def _numbers_of(self, step: int) -> np.ndarray:
        """The row numbers of a step, over all replicas."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch not in self._permutations:
            self._permutations[epoch] = self._permute(epoch)
            if len(self._permutations) > 2:  # Of the training, and of headers that are in the next epoch already.
                self._permutations.popitem(last=False)
        start = step_of_epoch * self._rows_per_step
        return self._permutations[epoch][start : min(start + self._rows_per_step, self._rows_per_epoch)]

    def _permute(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._rows))
        # The CPU generator uses only the low 32 bits of its seed, so (seed, epoch) is hashed into these.
        seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        if self._sampling != "group_by_length":
            return torch.randperm(len(self._rows), generator=generator).numpy()
        lengths, size = self._rows.lengths.tolist(), self._batch_size
        grouped = np.array(get_length_grouped_indices(lengths, size, generator=generator))
        # One microbatch after the other has all lengths of a window, from long to short; they are shuffled, whole ones.
        whole = len(grouped) // size * size
        microbatches = grouped[:whole].reshape(-1, size)
        shuffled = microbatches[torch.randperm(len(microbatches), generator=generator).numpy()]
        return np.concatenate([shuffled.reshape(-1), grouped[whole:]])

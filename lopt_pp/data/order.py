"""Which rows each optimizer step takes, as a function of the step's number alone."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lopt_pp.data.formats import IGNORE_INDEX, EncodedRow
from lopt_pp.data.loading import TokenizedRows


@dataclass(frozen=True)
class TokenCounts:
    """How many tokens a step has, over all replicas.

    Attributes:
        num_tokens: real tokens, without padding.
        num_targets: tokens with a loss.
    """

    num_tokens: int
    num_targets: int


@dataclass(frozen=True)
class Microbatch:
    """Some rows of one optimizer step, padded on the right to the longest of them.

    Attributes:
        step: the optimizer step, from 0.
        index: the place of the microbatch within the step, over all replicas, from 0.
        input_ids: int64 [rows, tokens], the padding token's id on padding.
        labels: int64 [rows, tokens], aligned with `input_ids`; -100 on padding and wherever no loss counts.
        token_mask: bool [rows, tokens], True on real tokens.
        target_positions: int64 [n], the places along a row from which some row's next token is predicted with a loss.
        num_tokens: the number of real tokens.
        num_targets: the number of tokens with a loss, `(labels[:, 1:] != -100).sum()`.
    """

    step: int
    index: int
    input_ids: torch.Tensor
    labels: torch.Tensor
    token_mask: torch.Tensor
    target_positions: torch.Tensor
    num_tokens: int
    num_targets: int

    def to(self, device: torch.device | str) -> "Microbatch":
        """The microbatch on `device`. From pinned memory the copy does not wait for the device."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            token_mask=self.token_mask.to(device, non_blocking=True),
            target_positions=self.target_positions.to(device, non_blocking=True),
        )


class DataOrder:
    """The microbatches of every optimizer step, with random access.

    It keeps no position: each process derives the same order for itself, and a resumed run goes on where it stopped by
    asking for its next step. Every epoch is a permutation of all rows, cut into steps of
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
    """

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        per_device_train_batch_size: int,
        gradient_accumulation_steps: int,
        shuffle: bool,
        seed: int,
        pad_token_id: int,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self._rows = rows
        self._batch_size = per_device_train_batch_size
        self._rows_per_step = per_device_train_batch_size * gradient_accumulation_steps * num_replicas
        self._replica = replica
        self._num_replicas = num_replicas
        self._shuffle = shuffle
        self._seed = seed
        self._pad_token_id = pad_token_id
        self._permuted_epoch = 0
        self._permutation = self._permute(0)
        self.steps_per_epoch = math.ceil(len(rows) / self._rows_per_step)

    def epoch(self, step: int) -> float:
        """The epochs that have passed when the step `step` is done, for logs (as `transformers` counts them)."""
        return (step + 1) / self.steps_per_epoch

    def counts(self, step: int) -> TokenCounts:
        """The tokens of a whole step, over all replicas, without reading them."""
        rows = self._rows_of(step)
        return TokenCounts(int(self._rows.lengths[rows].sum()), int(self._rows.num_targets[rows].sum()))

    def shapes(self, step: int) -> list[tuple[int, int]]:
        """The (rows, tokens) of each of the replica's microbatches of a step, without reading tokens."""
        return [
            (len(rows), int(self._rows.lengths[rows].max())) if len(rows) else (1, 1)
            for _, rows in self._microbatch_rows(step)
        ]

    def microbatches(self, step: int) -> list[Microbatch]:
        """The replica's microbatches of a step, on the CPU."""
        return [
            _collate([self._rows[int(row)] for row in rows], step, index, self._pad_token_id)
            for index, rows in self._microbatch_rows(step)
        ]

    def _microbatch_rows(self, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """The index and the row numbers of each of the replica's microbatches of a step."""
        rows = self._rows_of(step)
        taken = self._batch_size * self._num_replicas
        for turn in range(math.ceil(len(rows) / taken)):
            index = turn * self._num_replicas + self._replica
            yield index, rows[index * self._batch_size : (index + 1) * self._batch_size]

    def _rows_of(self, step: int) -> np.ndarray:
        """The row numbers of a step, over all replicas."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._permuted_epoch:
            self._permutation = self._permute(epoch)
            self._permuted_epoch = epoch
        start = step_of_epoch * self._rows_per_step
        return self._permutation[start : start + self._rows_per_step]

    def _permute(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._rows))
        # The CPU generator uses only the low 32 bits of its seed, so (seed, epoch) is hashed into these.
        seed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        return torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed)).numpy()


def _collate(rows: Sequence[EncodedRow], step: int, index: int, pad_token_id: int) -> Microbatch:
    shape = max(len(rows), 1), max((len(row.input_ids) for row in rows), default=1)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORE_INDEX)
    token_mask = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[number, :length] = torch.tensor(row.input_ids)
        labels[number, :length] = torch.tensor(row.labels)
        token_mask[number, :length] = True
    has_target = labels[:, 1:] != IGNORE_INDEX
    return Microbatch(
        step=step,
        index=index,
        input_ids=input_ids,
        labels=labels,
        token_mask=token_mask,
        target_positions=has_target.any(dim=0).nonzero().squeeze(1),
        num_tokens=int(token_mask.sum()),
        num_targets=int(has_target.sum()),
    )

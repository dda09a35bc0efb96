"""The tensors of a microbatch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lopt_pp.data.encoding import EncodedRow
from lopt_pp.data.formats import IGNORE_INDEX


@dataclass(frozen=True)
class Microbatch:
    """Some rows of one optimizer step, padded on the right to the longest of them.

    Attributes:
        step: the optimizer step, from 0.
        index: the place of the microbatch within the step, over all replicas, from 0.
        input_ids: int64 [sequences, tokens], the padding token's id on padding.
        labels: int64 [sequences, tokens], aligned with `input_ids`; -100 on padding and wherever no loss counts.
        token_mask: bool [sequences, tokens], True on real tokens.
        target_positions: int64 [n], the places along a sequence from which the next token of some sequence is predicted
            with a loss.
        num_tokens: the number of real tokens.
        num_targets: the number of tokens with a loss, `(labels[:, 1:] != -100).sum()`.
        position_ids: int64 [sequences, tokens] where rows of the data share a sequence here: each counts from 0, and
            the padding does so again and again, up to the longest row. By that `transformers` keeps their attention
            apart. None where each has one to itself.
    """

    step: int
    index: int
    input_ids: torch.Tensor
    labels: torch.Tensor
    token_mask: torch.Tensor
    target_positions: torch.Tensor
    num_tokens: int
    num_targets: int
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Microbatch":
        """The microbatch on `device`. From pinned memory the copy does not wait for the device."""
        positions = None if self.position_ids is None else self.position_ids.to(device, non_blocking=True)
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            token_mask=self.token_mask.to(device, non_blocking=True),
            target_positions=self.target_positions.to(device, non_blocking=True),
            position_ids=positions,
        )


def collate(
    packs: Sequence[Sequence[EncodedRow]], step: int, index: int, pad_token_id: int, keep_apart: bool
) -> Microbatch:
    """Makes a microbatch.

    Args:
        packs: the rows of the data in each sequence of it.
        step: the optimizer step.
        index: of the microbatch in the step.
        pad_token_id: what pads.
        keep_apart: whether rows of the data may share a sequence of the microbatch, and are to be kept apart.
    """
    shape = max(len(packs), 1), max((sum(len(row.input_ids) for row in pack) for pack in packs), default=1)
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORE_INDEX)
    token_mask = torch.zeros(shape, dtype=torch.bool)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    # Padding may be longer than any row; a model may have no positions beyond those.
    longest = max((len(row.input_ids) for pack in packs for row in pack), default=1)
    # Each row of the data gets positions from 0, by which attention keeps those of one sequence apart.
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            stop = start + len(row.input_ids)
            input_ids[number, start:stop] = torch.tensor(row.input_ids)
            labels[number, start:stop] = torch.tensor(row.labels)
            if keep_apart:
                labels[number, start] = IGNORE_INDEX  # Nothing of its own row predicts the first token.
            position_ids[number, start:stop] = torch.arange(stop - start)
            start = stop
        token_mask[number, :start] = True
        position_ids[number, start:] = torch.arange(shape[1] - start) % longest
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
        position_ids=position_ids if keep_apart else None,
    )

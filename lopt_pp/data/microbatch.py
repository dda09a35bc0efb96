"""The tensors of a microbatch."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from lopt_pp.data.encoding import EncodedRow
from lopt_pp.data.formats import IGNORE_INDEX

_FROM_MASKS = torch.empty(0, dtype=torch.int64)
"""Stands for indices that are still to be made."""


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
        token_indices: int64 [num_tokens], the real tokens among all `sequences * tokens` of them, ascending: what
            `token_mask` says. On a GPU `hidden_states.flatten(0, 1)[token_indices]` is made without a wait, and
            `hidden_states[token_mask]` is not: its shape depends on values. Made of the mask where not given.
        target_indices: int64 [num_targets], likewise the tokens from which the next one is predicted with a loss.
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
    token_indices: torch.Tensor = field(default=_FROM_MASKS)
    target_indices: torch.Tensor = field(default=_FROM_MASKS)

    def __post_init__(self) -> None:
        if self.token_indices is _FROM_MASKS:
            object.__setattr__(self, "token_indices", _places(self.token_mask))
        if self.target_indices is _FROM_MASKS:
            has_target = F.pad(self.labels[:, 1:] != IGNORE_INDEX, (0, 1))
            object.__setattr__(self, "target_indices", _places(has_target))

    @property
    def targets(self) -> torch.Tensor:
        """int64 [num_targets], the tokens that are predicted from `target_indices`."""
        return self.labels.flatten()[self.target_indices + 1]

    @property
    def for_block(self) -> dict[str, Any]:
        """What a block's forward is to know of it besides what enters the block, by its arguments' names.

        Without a real token, as of a replica that has run out of rows, there is nothing to balance routers by.
        """
        mask = self.token_mask if self.num_tokens else None
        return {"logits_to_keep": self.target_positions, "position_ids": self.position_ids, "token_mask": mask}

    def to(self, device: torch.device | str) -> "Microbatch":
        """The microbatch on `device`. From pinned memory the copy does not wait for the device."""
        return self._with_all(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Microbatch":
        """The microbatch, on the CPU, in memory that a GPU can read while the host goes on."""
        return self._with_all(torch.Tensor.pin_memory)

    def with_tensors(self, **tensors: torch.Tensor | None) -> "Microbatch":
        """The microbatch, on the CPU, with other tensors, from whose masks the indices are made anew."""
        made = {"token_indices": _FROM_MASKS, "target_indices": _FROM_MASKS, **tensors}
        return dataclasses.replace(self, **made)  # type: ignore[arg-type]

    def _with_all(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Microbatch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: move(value) for name, value in tensors.items()})  # type: ignore[arg-type]


def _places(mask: torch.Tensor) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1)


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
    # Where no sequence has a second row, nor padding, the positions are the usual ones, and attention needs no mask.
    starts_anew = keep_apart and bool((position_ids.diff(dim=1) != 1).any())
    return Microbatch(
        step=step,
        index=index,
        input_ids=input_ids,
        labels=labels,
        token_mask=token_mask,
        target_positions=has_target.any(dim=0).nonzero().squeeze(1),
        num_tokens=int(token_mask.sum()),
        num_targets=int(has_target.sum()),
        position_ids=position_ids if starts_anew else None,
    )

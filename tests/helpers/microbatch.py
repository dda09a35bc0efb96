"""A microbatch and the output of a block on it, for tests of losses."""

import torch

from lopt_pp.data import Microbatch
from lopt_pp.model.block import BlockOutput

HIDDEN, VOCABULARY = 32, 11

# Three rows of 6, 3 and 5 tokens; the second has no target.
LENGTHS = [6, 3, 5]
LABELS = [[-100, -100, -100, 4, 5, 6], [-100, -100, -100, -100, -100, -100], [7, 8, -100, 9, 10, -100]]
TARGETS = [(0, 3, 4), (0, 4, 5), (0, 5, 6), (2, 1, 8), (2, 3, 9), (2, 4, 10)]
"""Row, place and id of each token with a loss; the first of a row is never predicted."""


def make_batch(labels: list[list[int]] = LABELS) -> Microbatch:
    token_mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    has_target = torch.tensor(labels)[:, 1:] != -100
    return Microbatch(
        step=0,
        index=0,
        input_ids=torch.where(token_mask, 3, 0),
        labels=torch.tensor(labels),
        token_mask=token_mask,
        target_positions=has_target.any(dim=0).nonzero().squeeze(1),
        num_tokens=sum(LENGTHS),
        num_targets=int(has_target.sum()),
    )


def random_output() -> BlockOutput:
    """Of a block that has both losses: random hidden states, and logits of the places before some target."""
    torch.manual_seed(0)
    shape = len(LENGTHS), max(LENGTHS)
    hidden_states = torch.randn(*shape, HIDDEN, requires_grad=True)
    logits = torch.randn(shape[0], len(make_batch().target_positions), VOCABULARY, requires_grad=True)
    return BlockOutput(torch.randn(*shape, HIDDEN), hidden_states, logits)


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]

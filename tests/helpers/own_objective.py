"""Objectives as a user may write them, and some that are none."""

from typing import Any

import torch
from torch import nn

from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives import Objective, Site


class TokenItself(Objective):
    """A linear head on the block's output predicts the token at each place, of the first 40."""

    name = "token_loss"
    rate_share = 0.5
    summary = "telling its own tokens"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.head = nn.Linear(site.hidden_size, 40)
        nn.init.normal_(self.head.weight, std=0.02, generator=site.generator)
        nn.init.zeros_(self.head.bias)

    def count(self, counts: TokenCounts) -> int:
        return counts.num_tokens

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        logits = self.head(output.hidden_states[batch.token_mask]).float()
        return nn.functional.cross_entropy(logits, batch.input_ids[batch.token_mask] % 40, reduction="sum")


class Small(Objective):
    """Has no head and no constructor: hidden states are to be small."""

    name = "size_loss"

    def count(self, counts: TokenCounts) -> int:
        return counts.num_tokens

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        return output.hidden_states[batch.token_mask].float().pow(2).mean(-1).sum()


class Undetermined(Small):
    """Uses an operator that PyTorch has no deterministic form of."""

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        torch.zeros(2).put_(torch.zeros(2, dtype=torch.int64), torch.ones(2))
        return super().forward(output, batch)


class Nameless(Small):
    name = "size"


class OtherArguments(Small):
    def __init__(self, size: int, depth: int) -> None:
        super().__init__()


class Fails(Small):
    def __init__(self, site: Site) -> None:
        raise ValueError("no such head")


class Unfinished(Objective):
    name = "unfinished_loss"

    def count(self, counts: TokenCounts) -> int:
        return 0


class NoObjective(nn.Module):
    def forward(self, *arguments: Any) -> None: ...

"""The paper's local objective: a block reconstructs its own input."""

import torch
import torch.nn.functional as F
from torch import nn

from lopt_pp.config.objective import LOCAL_RATES
from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives.base import Objective, Site


class Reconstruction(Objective):
    """A small head on the block's output predicts the block's own input.

    `mean((head(h_out) - stopgrad(h_in))^2)` over the real tokens and the hidden dimension, the target in float32.
    Source: LoPT, arXiv 2605.04913. Its weight is the paper's lambda.
    """

    name = "reconstruction_loss"
    rate_share = LOCAL_RATES["reconstruction"].rate_share
    safe_rate_share = LOCAL_RATES["reconstruction"].safe_rate_share
    reads_weights = False
    summary = "the reconstruction of its own input"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight = site.config.reconstruction_weight
        self.head = reconstruction_head(site.hidden_size, site.generator)

    def count(self, counts: TokenCounts) -> int:
        return counts.num_tokens

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        left, entered = (
            states.flatten(0, 1).index_select(0, batch.token_indices)
            for states in (output.hidden_states, output.inputs)
        )
        predicted, target = self.head(left).float(), entered.float()
        return F.mse_loss(predicted, target, reduction="sum") / target.shape[-1]


def reconstruction_head(hidden_size: int, generator: torch.Generator) -> nn.Sequential:
    """Down to a quarter of the hidden size and up again; drawn Xavier-uniform with gain 0.1, with zero biases."""
    head = nn.Sequential(
        nn.LayerNorm(hidden_size),
        nn.Linear(hidden_size, hidden_size // 4),
        nn.GELU(),
        nn.Linear(hidden_size // 4, hidden_size),
    )
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, gain=0.1, generator=generator)
            nn.init.zeros_(module.bias)
    return head

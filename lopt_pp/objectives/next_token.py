"""The next token: the loss of a model that continues text."""

import torch
import torch.nn.functional as F
from torch import nn

from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives.base import Objective

CPU_LOGITS, CUDA_LOGITS = 2**23, 2**27
"""Number of logits that are there at once: what fits caches, or keeps a GPU busy."""


class NextToken(Objective):
    """The task loss: cross-entropy of the last block's logits with the next target token, in float32.

    Where the output head is a plain linear map the logits are never all there at once: the loss and its gradient are
    made some rows of logits at a time (`torch.nn.functional.linear_cross_entropy`).
    """

    name = "loss"
    rate_share = 1.0

    def count(self, counts: TokenCounts) -> int:
        return counts.num_targets

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        if output.logits is not None:
            targets = batch.labels[:, 1:][:, batch.target_positions]
            return F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        assert output.features is not None and output.head is not None
        features = output.features.flatten(0, 1).index_select(0, batch.target_indices)
        return linear_cross_entropy(features, output.head.weight, output.head.bias, batch.targets)


def linear_cross_entropy(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The summed cross-entropy of `features @ weight.T + bias` with `targets`, without holding all the logits.

    Args:
        features: `[tokens, hidden]`.
        weight: `[vocabulary, hidden]`.
        bias: `[vocabulary]`, or None.
        targets: int64 `[tokens]`.

    Returns:
        A float32 scalar.
    """
    features, weight, bias = as_autocast(features, weight, bias)
    if not hasattr(F, "linear_cross_entropy"):  # PyTorch before 2.13.
        return F.cross_entropy(F.linear(features, weight, bias).float(), targets, reduction="sum")
    chunk = max(1, (CUDA_LOGITS if features.is_cuda else CPU_LOGITS) // weight.shape[0])
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    # The sum comes back in the dtype of the features, and would be rounded to bfloat16; single losses bear that.
    reduction = "sum" if features.dtype == torch.float32 else "none"
    losses = F.linear_cross_entropy(features, weight, targets, linear_bias=bias, reduction=reduction, options=options)
    return losses.float().sum()


def as_autocast(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Features, weight and bias in the dtype that autocast has a linear map compute in, where it is on."""
    if not torch.is_autocast_enabled(features.device.type):
        return features, weight, bias
    dtype = torch.get_autocast_dtype(features.device.type)
    return features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

"""The next token: the loss of a model that continues text."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives.base import Objective

CPU_LOGITS, CUDA_LOGITS = 2**23, 2**27
"""Number of logits that are there at once: what fits caches, or keeps a GPU busy."""


_PLAIN = ObjectiveConfig()


class NextToken(Objective):
    """The task loss: cross-entropy of the last block's logits with the next target token, in float32.

    Where the output head is a plain linear map the logits are never all there at once: the loss and its gradient are
    made some rows of logits at a time (`torch.nn.functional.linear_cross_entropy`).

    While it trains, `--label_smoothing_factor` and `--loss_type dft` change it; measured, it is the plain one.

    Args:
        config: the flags.
    """

    name = "loss"
    rate_share = 1.0

    def __init__(self, config: ObjectiveConfig = _PLAIN) -> None:
        super().__init__()
        self._smoothing = config.label_smoothing_factor
        self._is_dft = config.loss_type == "dft"

    def count(self, counts: TokenCounts) -> int:
        return counts.num_targets

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        smoothing = self._smoothing if self.training else 0.0
        is_dft = self._is_dft and self.training
        if output.logits is not None:
            targets = batch.labels[:, 1:][:, batch.target_positions].flatten()
            logits, reduction = output.logits.flatten(0, 1).float(), "none" if is_dft else "sum"
            losses = F.cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
            return dft_loss(losses) if is_dft else losses
        assert output.features is not None and output.head is not None
        features = output.features.flatten(0, 1).index_select(0, batch.target_indices)
        head = output.head
        return linear_cross_entropy(features, head.weight, head.bias, batch.targets, smoothing, is_dft)


def dft_loss(losses: torch.Tensor) -> torch.Tensor:
    """The sum of the losses of single tokens, each weighted by the probability that its target has (without gradient).

    Source: "On the Generalization of SFT", arXiv 2508.05629.
    """
    return (losses * torch.exp(-losses.detach())).sum()


def linear_cross_entropy(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    smoothing: float = 0.0,
    is_dft: bool = False,
) -> torch.Tensor:
    """The summed cross-entropy of `features @ weight.T + bias` with `targets`, without holding all the logits.

    Args:
        features: `[tokens, hidden]`.
        weight: `[vocabulary, hidden]`.
        bias: `[vocabulary]`, or None.
        targets: int64 `[tokens]`.
        smoothing: of the targets: the share that all tokens of the vocabulary have of them alike.
        is_dft: whether single losses are weighted as `dft_loss` says.

    Returns:
        A float32 scalar.
    """
    features, weight, bias = as_autocast(features, weight, bias)
    if not hasattr(F, "linear_cross_entropy"):  # PyTorch before 2.13.
        logits, kind = F.linear(features, weight, bias).float(), "none" if is_dft else "sum"
        single = F.cross_entropy(logits, targets, reduction=kind, label_smoothing=smoothing)
        return dft_loss(single) if is_dft else single
    chunk = max(1, (CUDA_LOGITS if features.is_cuda else CPU_LOGITS) // weight.shape[0])
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    # The sum comes back in the dtype of the features, and would be rounded to bfloat16; single losses bear that.
    reduction = "sum" if features.dtype == torch.float32 and not is_dft else "none"
    # With smoothed targets PyTorch does not chunk, and says so where it is given chunks.
    more: dict[str, Any] = {"label_smoothing": smoothing} if smoothing else {"options": options}
    losses = F.linear_cross_entropy(features, weight, targets, linear_bias=bias, reduction=reduction, **more).float()
    return dft_loss(losses) if is_dft else losses.sum()


def as_autocast(
    features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Features, weight and bias in the dtype that autocast has a linear map compute in, where it is on."""
    if not torch.is_autocast_enabled(features.device.type):
        return features, weight, bias
    dtype = torch.get_autocast_dtype(features.device.type)
    return features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

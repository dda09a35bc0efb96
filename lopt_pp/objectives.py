"""What each block learns from: the task on the last block, the reconstruction of its own input on the others.

An objective gives a *sum* over the tokens that count, and says how many count. The stage divides by the count of the
whole optimizer step, so that a step's loss is the mean over its tokens whichever way it is cut into microbatches.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from lopt_pp.data import IGNORE_INDEX, Microbatch, TokenCounts
from lopt_pp.errors import LoptError
from lopt_pp.flags import check_types
from lopt_pp.split import BlockOutput

_CPU_LOGITS, CUDA_LOGITS = 2**23, 2**27
"""Number of logits that are there at once: what fits caches, or keeps a GPU busy."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the blocks learn from."""

    _argument_group_name: ClassVar[str] = "Local objectives"

    method: Literal["lopt", "frozen", "e2e"] = field(
        default="lopt",
        metadata={
            "help": "lopt: every block learns from its own loss. frozen: the blocks before the last only run forward, "
            "the cheap baseline that local learning must beat. e2e: the whole model learns from the task, in one "
            "process or as a 1F1B pipeline with one block in each process, for comparison."
        },
    )
    reconstruction_weight: float = field(
        default=10.0,
        metadata={
            "help": "Weight of the reconstruction loss (the paper's lambda). Adam makes full-sized steps for any loss, "
            "so the block's learning rate says far more about how far it moves than this weight does."
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.reconstruction_weight < 0:
            raise LoptError(f"--reconstruction_weight {self.reconstruction_weight}: at least 0")


class Objective(nn.Module, ABC):
    """A local loss: sees one block's output and input and the microbatch, and never another stage."""

    name: ClassVar[str]
    """The loss's name in logs and metrics."""

    weight: float = 1.0
    """What the mean loss is multiplied by before backward."""

    @abstractmethod
    def count(self, counts: TokenCounts) -> int:
        """Of the tokens of a step, the number that count."""

    @abstractmethod
    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        """The loss summed over the tokens that count: a float32 scalar, connected to the block's graph."""


class Reconstruction(Objective):
    """The paper's local loss: a small head on the block's output predicts the block's own input.

    `mean((head(h_out) - stopgrad(h_in))^2)` over the real tokens and the hidden dimension, the target in float32.
    Source: LoPT, arXiv 2605.04913.

    Args:
        hidden_size: of the model.
        weight: the paper's lambda.
        generator: draws the head's initial weights (Xavier-uniform with gain 0.1; biases are zero).
    """

    name = "reconstruction_loss"

    def __init__(self, hidden_size: int, weight: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = weight
        self.head = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, hidden_size // 4),
            nn.GELU(),
            nn.Linear(hidden_size // 4, hidden_size),
        )
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=0.1, generator=generator)
                nn.init.zeros_(module.bias)

    def count(self, counts: TokenCounts) -> int:
        return counts.num_tokens

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        predicted = self.head(output.hidden_states[batch.token_mask]).float()
        target = output.inputs[batch.token_mask].float()
        return F.mse_loss(predicted, target, reduction="sum") / target.shape[-1]


class NextToken(Objective):
    """The task loss: cross-entropy of the last block's logits with the next target token, in float32.

    Where the output head is a plain linear map the logits are never all there at once: the loss and its gradient are
    made some rows of logits at a time (`torch.nn.functional.linear_cross_entropy`).
    """

    name = "loss"

    def count(self, counts: TokenCounts) -> int:
        return counts.num_targets

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        if output.logits is not None:
            targets = batch.labels[:, 1:][:, batch.target_positions]
            return F.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        assert output.features is not None and output.head is not None
        has_target = batch.labels[:, 1:] != IGNORE_INDEX
        return linear_cross_entropy(
            output.features[:, :-1][has_target], output.head.weight, output.head.bias, batch.labels[:, 1:][has_target]
        )


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
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
        features, weight = features.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if not hasattr(F, "linear_cross_entropy"):  # PyTorch before 2.13.
        return F.cross_entropy(F.linear(features, weight, bias).float(), targets, reduction="sum")
    chunk = max(1, (CUDA_LOGITS if features.is_cuda else _CPU_LOGITS) // weight.shape[0])
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    # The sum comes back in the dtype of the features, and would be rounded to bfloat16; single losses bear that.
    reduction = "sum" if features.dtype == torch.float32 else "none"
    losses = F.linear_cross_entropy(features, weight, targets, linear_bias=bias, reduction=reduction, options=options)
    return losses.float().sum()

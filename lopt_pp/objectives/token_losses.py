"""What a model says of single tokens: the loss of each target, the likeliest token, the entropy of the prediction.

Without a gradient, and without holding all the logits: for evaluations, and for objectives that need the
log-probability of tokens under a model that they do not train.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lopt_pp.data import IGNORE_INDEX, Microbatch
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives.next_token import CPU_LOGITS, CUDA_LOGITS, as_autocast


@dataclass(frozen=True)
class TokenLosses:
    """Of some targets, one after another.

    Attributes:
        losses: float32 [targets], in nats: the cross-entropy, which is the negative log-probability of the target.
        likeliest: int64 [targets], the token with the greatest logit in the place of each.
        entropies: float32 [targets], in nats, of the distribution over all tokens there; None where it is not wanted.
    """

    losses: torch.Tensor
    likeliest: torch.Tensor
    entropies: torch.Tensor | None


@torch.no_grad()
def token_losses(output: BlockOutput, batch: Microbatch, entropies: bool = False) -> TokenLosses:
    """What the last block says of each target of a microbatch, in the order of `batch.target_indices`.

    Args:
        output: of the last block, with its logits or with what enters its head.
        batch: the same microbatch, on the device of the output.
        entropies: whether they are wanted.
    """
    if output.logits is not None:
        targets = batch.labels[:, 1:][:, batch.target_positions].flatten()
        counted = (targets != IGNORE_INDEX).nonzero().squeeze(1)
        logits = output.logits.flatten(0, 1)
        return _joined(
            _of_logits(logits[rows], targets[rows], entropies) for rows in _chunks(counted, logits.shape[-1])
        )
    assert output.features is not None and output.head is not None
    features = output.features.flatten(0, 1).index_select(0, batch.target_indices)
    return linear_token_losses(features, output.head.weight, output.head.bias, batch.targets, entropies)


@torch.no_grad()
def linear_token_losses(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    entropies: bool = False,
) -> TokenLosses:
    """What `features @ weight.T + bias`, as logits, say of each target, made some rows of logits at a time.

    Args:
        features: `[tokens, hidden]`.
        weight: `[vocabulary, hidden]`.
        bias: `[vocabulary]`, or None.
        targets: int64 `[tokens]`.
        entropies: whether they are wanted.
    """
    features, weight, bias = as_autocast(features, weight, bias)
    rows = torch.arange(len(targets), device=features.device)
    return _joined(
        _of_logits(F.linear(features[part], weight, bias), targets[part], entropies)
        for part in _chunks(rows, weight.shape[0])
    )


def _chunks(rows: torch.Tensor, vocabulary: int) -> Iterator[torch.Tensor]:
    """Row numbers, so many at a time that few logits are there at once; once where there are none."""
    most = (CUDA_LOGITS if rows.is_cuda else CPU_LOGITS) // 2  # There are two tensors of that size.
    yield from rows.split(max(1, most // vocabulary))


@torch.no_grad()
def _of_logits(logits: torch.Tensor, targets: torch.Tensor, entropies: bool) -> TokenLosses:
    logits = logits.float()
    likeliest = logits.argmax(-1)
    log_probs = logits.log_softmax(-1)
    losses = -log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    own = torch.special.entr(log_probs.exp_()).sum(-1) if entropies else None
    return TokenLosses(losses, likeliest, own)


def _joined(parts: Iterator[TokenLosses]) -> TokenLosses:
    made = list(parts)
    entropies = [part.entropies for part in made if part.entropies is not None]
    return TokenLosses(
        torch.cat([part.losses for part in made]),
        torch.cat([part.likeliest for part in made]),
        torch.cat(entropies) if entropies else None,
    )

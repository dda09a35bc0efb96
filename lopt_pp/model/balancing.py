"""The load balancing of mixtures of experts: each block adds its own layers' loss to whatever it learns from.

The loss is that of the model's family in `transformers`, over the routers of the block; see `docs/models.md`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.errors import LoptError

_LOSS = "load_balancing_loss_func"


def check_routers(model_class: type[PreTrainedModel], config: PreTrainedConfig, coefficient: float) -> None:
    """Sees that a model has routers whose load can be balanced, where that is asked for.

    Raises:
        LoptError: it has none.
    """
    if coefficient and not (hasattr(config, "output_router_logits") and _loss_of(model_class)):
        raise LoptError(
            f"--router_aux_loss_coef {coefficient}: {model_class.__name__} is not a mixture of experts whose routers "
            f"transformers balances; leave it out"
        )


def _loss_of(model_class: type[PreTrainedModel]) -> Any:
    return getattr(sys.modules.get(model_class.__module__), _LOSS, None)


class RouterBalancing:
    """Balances the routers of one block.

    Args:
        model: of the block.
        weight: of the loss.
        num_replicas: of the stage. The loss is a mean over the microbatches of a step that have tokens, of all of them.
    """

    def __init__(self, model: PreTrainedModel, weight: float, num_replicas: int) -> None:
        self._model = model
        self._weight = weight
        self._num_replicas = num_replicas
        self._num_microbatches = 1.0
        self._losses: list[torch.Tensor] = []

    def begin(self, num_microbatches: float) -> None:
        """Begins a step that learns from so many microbatches with tokens in each replica, in the mean."""
        self._num_microbatches = num_microbatches or 1.0
        self._losses = []

    def add(
        self, outgoing: torch.Tensor, router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor
    ) -> torch.Tensor:
        """Lets backward through a block's output go through its routers' loss as well.

        Args:
            outgoing: of the block, from which backward comes; of any shape.
            router_logits: of each layer with a router, `[sequences * tokens, experts]`.
            token_mask: bool `[sequences, tokens]`, True on real tokens.

        Returns:
            The same output.
        """
        if not router_logits:  # A block of dense layers.
            return outgoing
        model: Any = self._model
        loss = _loss_of(type(model))(router_logits, model.num_experts, model.num_experts_per_tok, token_mask)
        self._losses.append(loss.detach())
        apply: Callable[..., torch.Tensor] = _WithLoss.apply
        return apply(outgoing, loss * (self._weight / self._num_microbatches))

    def record(self) -> dict[str, float]:
        """This replica's share of the step's loss, unweighted, by name; 0 where nothing was routed or learned from."""
        total = float(torch.stack(self._losses).sum()) if self._losses else 0.0
        return {"router_aux_loss": total / (self._num_microbatches * self._num_replicas)}


class _WithLoss(torch.autograd.Function):
    """A tensor with which another loss goes backward, whatever its own gradient is."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_like = torch.ones_like(loss)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], ctx.loss_like

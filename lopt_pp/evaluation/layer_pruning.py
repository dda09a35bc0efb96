"""Leaves out layers of a model, one by one, each time the one without which the loss on rows is lowest.

Leaving out layers of a pretrained model by what the loss says is known from depth pruning (Shortened LLaMA, arXiv
2402.02834, ranks them once; here each is tried again after every removal).
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lopt_pp.data import Microbatch, TokenizedRows
from lopt_pp.evaluation.losses import means_over_targets, single_rows
from lopt_pp.model.block import BlockModel
from lopt_pp.objectives import Objective
from lopt_pp.util.compat_torch import replaced_forward


@dataclass(frozen=True)
class PrunedModel:
    """A model with some of its layers left out.

    Attributes:
        layers: after the cut, that are left.
        loss: the task's, a mean over the rows' target tokens, in nats.
    """

    layers: tuple[int, ...]
    loss: float


def prune_layers(
    front: BlockModel, rest: BlockModel, number: int, objective: Objective, rows: TokenizedRows, device: torch.device
) -> Iterator[PrunedModel]:
    """Leaves out one layer after another, each time the one that is missed least; the whole model comes first.

    Of layers that are missed alike the earliest goes. The model is whole again afterwards.

    Args:
        front: the model's block before the cut, on `device`.
        rest: its block after the cut, likewise.
        number: of layers after the cut that stay.
        objective: the task's loss.
        rows: that the loss is measured on.
        device: to measure on.
    """
    # The front is the same for all, and runs once.
    with torch.no_grad():
        entering = [front(input_ids=batch.input_ids).hidden_states for batch in single_rows(rows, device)]

    def loss(what: str) -> float:
        def of_row(batch: Microbatch) -> tuple[torch.Tensor]:
            wanted = {"logits_to_keep": batch.target_positions, "leave_logits": True}
            return (objective(rest(hidden_states=entering[batch.step], **wanted), batch),)

        (score,) = means_over_targets(of_row, rows, device, what)
        return score.value

    with _left_out(rest) as left_out:
        kept = list(rest.spec.layers)
        yield PrunedModel(tuple(kept), loss("the whole model"))
        while len(kept) > number:
            losses = {}
            for layer in kept:
                left_out.add(layer)
                losses[layer] = loss(f"{len(kept)} layers without {layer}")
                left_out.remove(layer)
            least = min(kept, key=losses.__getitem__)
            kept.remove(least)
            left_out.add(least)
            yield PrunedModel(tuple(kept), losses[least])


@contextlib.contextmanager
def _left_out(block: BlockModel) -> Iterator[set[int]]:
    """Gives the set of layers that hidden states pass by; empty at first."""
    numbers: set[int] = set()

    def passing(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        gives_tensor = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal gives_tensor
            entered = args[0] if args else kwargs["hidden_states"]
            if number in numbers and gives_tensor:
                return entered
            output = run(*args, **kwargs)
            gives_tensor = isinstance(output, torch.Tensor)
            if number not in numbers:
                return output
            return entered if gives_tensor else (entered, *output[1:])

        return forward

    with contextlib.ExitStack() as stack:
        for number, layer in zip(block.spec.layers, block.layers, strict=True):
            stack.enter_context(replaced_forward(layer, functools.partial(passing, number)))
        yield numbers

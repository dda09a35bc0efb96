"""The method in plain PyTorch, on the whole model in one process, written for the tests alone.

It shares nothing with the package: rows are collated here, the boundary is a detach in a hook, one AdamW has both.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

Row = tuple[list[int], list[int]]


class Head(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(size), nn.Linear(size, size // 4), nn.Linear(size // 4, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.up(nn.functional.gelu(self.down(self.norm(hidden))))


def without_padding(microbatches: Sequence[Any]) -> list[list[Row]]:
    """The rows of a step's microbatches, each as long as it is."""
    return [
        [
            (ids[:length].tolist(), labels[:length].tolist())
            for ids, labels, length in zip(batch.input_ids, batch.labels, batch.token_mask.sum(1), strict=True)
        ]
        for batch in microbatches
    ]


def train(
    model_path: str,
    head_state: Sequence[torch.Tensor] | None,
    steps: Sequence[Sequence[Sequence[Row]]],
    *,
    boundary: int | None,
    weight: float,
    rate: float,
    head_rate: float,
    weight_decay: float,
    epsilon: float,
    auxiliary_layer: int | None = None,
    learned: int | None = None,
) -> dict[str, torch.Tensor]:
    """Trains for the given steps (each a list of microbatches of rows), linear decay, no warm-up, no clipping.

    Without a boundary, the whole model learns from the task. Without a head's state, the first half learns from the
    task too, by a copy of the layer `auxiliary_layer` and of what comes after the last one. It learns from `learned` of
    the microbatches of each step, one after another through the steps, or from all of them.

    Returns:
        The weights of the whole model.
    """
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).train()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    head: nn.Module = Head(model.config.hidden_size)
    frozen = model.lm_head.weight.detach().clone()
    if auxiliary_layer is not None:
        head = nn.ModuleList([copy.deepcopy(model.model.layers[auxiliary_layer]), copy.deepcopy(model.model.norm)])
    elif boundary is not None and head_state is not None:
        for parameter, value in zip(head.parameters(), head_state, strict=True):
            parameter.data.copy_(value)
    seen: dict[str, Any] = {}

    def enter_first(_: nn.Module, args: tuple) -> None:
        seen["input"] = args[0].detach()

    def cut(_: nn.Module, args: tuple, kwargs: dict) -> tuple:
        seen["middle"], seen["places"] = args[0], kwargs
        return (args[0].detach(), *args[1:]), kwargs

    def local_loss(labels: list[int]) -> torch.Tensor:
        if head_state is not None:
            return weight * (head(seen["middle"]) - seen["input"]).pow(2).mean(-1).sum() / real
        assert isinstance(head, nn.ModuleList)
        layer, norm = head
        logits = norm(layer(seen["middle"], **seen["places"]))[0] @ frozen.T
        return nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum") / own_targets

    layers = model.model.layers
    if boundary is not None:
        layers[0].register_forward_pre_hook(enter_first)
        layers[boundary].register_forward_pre_hook(cut, with_kwargs=True)
        first = [*model.model.embed_tokens.parameters(), *layers[:boundary].parameters(), *head.parameters()]
        second = [*layers[boundary:].parameters(), *model.model.norm.parameters(), *model.lm_head.parameters()]
    else:
        first, second = [], list(model.parameters())
    groups = [
        {
            "params": [p for p in half if (p.ndim < 2) == vectors],
            "lr": lr,
            "weight_decay": 0.0 if vectors else weight_decay,
        }
        for half, lr in ((first, head_rate), (second, rate))
        for vectors in (False, True)
    ]
    adam = torch.optim.AdamW(groups, eps=epsilon)
    decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / len(steps))
    next_place = 0
    for step in steps:
        targets = sum(label != -100 for microbatch in step for _, labels in microbatch for label in labels[1:])
        places = [(next_place + place) % len(step) for place in range(min(learned or len(step), len(step)))]
        next_place += len(places)
        own = [row for place in places for row in step[place]]
        real = sum(len(ids) for ids, _ in own)
        own_targets = sum(label != -100 for _, labels in own for label in labels[1:])
        for place, microbatch in enumerate(step):
            for ids, labels in microbatch:  # Row by row: no padding anywhere.
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                task = nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum") / targets
                if boundary is not None and place in places:
                    task = task + local_loss(labels)
                task.backward()
        adam.step()
        adam.zero_grad()
        decay.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}

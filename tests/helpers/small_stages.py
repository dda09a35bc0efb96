"""Stages of a small model and microbatches for them, for tests of one stage by itself."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import Microbatch, MicrobatchSampler, TokenCounts, TokenizedRows
from lopt_pp.model.block import BlockModel
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec, split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import Objective, ObjectiveConfig, Reconstruction, local_objective
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.stage import Stage

HIDDEN = 64

# Rows as (number of tokens, number of target tokens, at the end).
UNEVEN = [(12, 9), (5, 1), (3, 1), (2, 1)]
"""Two microbatches of two rows, with 10 and 2 target tokens."""

FIRST, LAST = split_evenly(4, 2)


def make_block(model: Path, spec: BlockSpec) -> BlockModel:
    config = AutoConfig.from_pretrained(model)
    model_class = model_class_of(config)
    builder = BlockBuilder(model_class, config, check_split(model_class, config, split_evenly(4, 2)))
    return builder.from_pretrained(spec, PretrainedWeights(str(model)))


def make_stage(model: Path, spec: BlockSpec, dtype: str = "float32", seed: int = 0, **optim: float) -> Stage:
    block = make_block(model, spec)
    objective = local_objective(block, ObjectiveConfig(), seed)
    config = StageConfig(dtype=dtype)  # type: ignore[arg-type]
    return Stage(block, objective, OptimConfig(learning_rate=1e-2, **optim), 10, config=config, seed=seed)  # type: ignore[arg-type]


def microbatches(rows: Sequence[tuple[int, int]] = UNEVEN, batch_size: int = 2, step: int = 0) -> list[Microbatch]:
    """The microbatches of a step over all rows; their token ids are the same for every batch size."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 40, (tokens,), generator=draw).tolist() for tokens, _ in rows]
    labels = [
        [-100] * (len(row) - targets) + row[len(row) - targets :] for row, (_, targets) in zip(ids, rows, strict=True)
    ]
    lengths, num_targets = zip(*rows, strict=True)
    columns = {"input_ids": ids, "labels": labels, "length": lengths, "num_targets": num_targets}
    sampler = MicrobatchSampler(
        TokenizedRows(Dataset.from_dict(columns), "a test", {}),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(rows) // batch_size,
        shuffle=False,
        seed=0,
        pad_token_id=0,
        sampling="random",
    )
    return sampler.microbatches(step)


def received(stage: Stage, batch: Microbatch) -> torch.Tensor | None:
    """What the stage before sends: here a function of the token ids and places alone."""
    if stage.block.spec.is_first:
        return None
    table = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    places = torch.randn(batch.input_ids.shape[1], HIDDEN, generator=torch.Generator().manual_seed(2))
    return table[batch.input_ids] + places


def objective_of(stage: Stage) -> Objective:
    """The objective of a stage that learns."""
    assert stage.objective is not None
    return stage.objective


def optimizer_of(stage: Stage) -> Optimizer:
    """The optimizer of a stage that learns."""
    assert stage.optimizer is not None
    return stage.optimizer


def counts_of(batch: Microbatch) -> TokenCounts:
    """Of a step that has this microbatch only."""
    return TokenCounts(batch.num_tokens, batch.num_targets)


def accumulate(
    stage: Stage,
    batches: Sequence[Microbatch],
    receive: Callable[[Stage, Microbatch], torch.Tensor | None] = received,
) -> None:
    """Everything of a step but the optimizer's part, as the training loop does it."""
    count = sum(objective_of(stage).count(counts_of(batch)) for batch in batches)
    for batch in batches:
        output = stage.forward(batch, receive(stage, batch))
        stage.loss(output, batch, count).backward()


def parameters(stage: Stage) -> dict[str, nn.Parameter]:
    named = dict(stage.block.named_parameters())
    if isinstance(stage.objective, Reconstruction):
        named |= {f"head.{name}": parameter for name, parameter in stage.objective.named_parameters()}
    return named


def gradients(stage: Stage) -> dict[str, torch.Tensor]:
    """The gradient of each parameter; none is left out."""
    found = {name: parameter.grad for name, parameter in parameters(stage).items()}
    assert found
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def values(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters(stage).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def make_warming_stage(
    model: Path,
    objective: ObjectiveConfig,
    steps: int = 2,
    local_accumulation_steps: int | None = None,
    **optim: float,
) -> Stage:
    block = make_block(model, FIRST)
    if not objective.train_embeddings:
        block.freeze_embeddings()
    own = local_objective(block, objective, 0, functools.partial(make_block, model))
    optim = {"learning_rate": 1e-2, "weight_decay": 0.1} | optim
    warmup = {"local_head_warmup_steps": steps, "local_accumulation_steps": local_accumulation_steps}
    return Stage(block, own, OptimConfig(**optim), 10, **warmup)  # type: ignore[arg-type]

"""Trains cases end to end, on rank 0 alone or on ranks 1 and 2; for `ranks`, with a file of cases as the argument.

A case is {"name", "model", "rows": files, "accumulation", "schedule": null for rank 0 alone, "steps", "batch_size",
"rate", "max_grad_norm", "dtype", "output": a directory}. The schedule OWN_SHAPES is the benchmarks' own 1F1B. Every
process writes the weights of its blocks, its losses and the gradient norms to OUTPUT/RANK.pt.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer

from benchmarks.helpers.own_shapes import OwnShapesPipeline
from lopt_pp.config.compute import StageConfig
from lopt_pp.data import DataConfig, MicrobatchSampler, load_rows
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import ObjectiveConfig
from lopt_pp.stage.end_to_end import EndToEndPipeline, clip_grad_norm

OWN_SHAPES = "1F1B, own shapes"


def data_order(case: dict[str, Any]) -> MicrobatchSampler:
    return MicrobatchSampler(
        load_rows(DataConfig(train_file=case["rows"]), AutoTokenizer.from_pretrained(case["model"])),
        per_device_train_batch_size=case["batch_size"],
        gradient_accumulation_steps=case["accumulation"],
        shuffle=True,
        seed=3,
        pad_token_id=0,
    )


def stages_of(schedule: str | None, position: int) -> tuple[int, ...]:
    """Of 4 blocks for the schedules that interleave, of 2 or 1 for the others."""
    if schedule == "ZBVZeroBubble":
        return (position, 3 - position)
    return (position, position + 2) if schedule == "InterleavedZeroBubble" else (position,)


def train(case: dict[str, Any], group: dist.ProcessGroup | None, num_blocks: int) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(case["model"])
    specs = split_evenly(config.num_hidden_layers, num_blocks)
    model_class = model_class_of(config)
    builder = BlockBuilder(model_class, config, check_split(model_class, config, specs))
    checkpoint = PretrainedWeights(case["model"])
    own = stages_of(case["schedule"], 0 if group is None else dist.get_rank(group))
    blocks = [builder.from_pretrained(specs[stage], checkpoint) for stage in own]
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    adam = torch.optim.AdamW(parameters, lr=case["rate"], eps=1e-6)
    config = StageConfig(dtype=case["dtype"])
    own_shapes = case["schedule"] == OWN_SHAPES
    pipeline = (OwnShapesPipeline if own_shapes else EndToEndPipeline)(
        blocks,
        group,
        config=config,
        objective=ObjectiveConfig(),
        schedule="1F1B" if own_shapes or case["schedule"] is None else case["schedule"],
    )
    sampler = data_order(case)
    losses, norms = [], []
    for step in range(case["steps"]):
        batches = sampler.microbatches(step)
        losses.append(pipeline.step(batches, sum(batch.num_targets for batch in batches)))
        norms.append(clip_grad_norm(parameters, case["max_grad_norm"], group).item())
        adam.step()
        adam.zero_grad()
    weights = {name: parameter.detach() for block in blocks for name, parameter in block.model.named_parameters()}
    return {"weights": weights, "losses": losses, "norms": norms}


def main(arguments: Sequence[str]) -> int:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # The pipeline is not the world, and positions in it are not ranks.
    pair = dist.new_group([1, 2])
    for case in json.loads(Path(arguments[0]).read_text()):
        alone = case["schedule"] is None
        if alone != (rank == 0):
            continue
        num_blocks = 1 if alone else 4 if "ZeroBubble" in case["schedule"] else 2
        directory = Path(case["output"])
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(train(case, None if alone else pair, num_blocks), directory / f"{rank}.pt")
    dist.destroy_process_group()
    return 0

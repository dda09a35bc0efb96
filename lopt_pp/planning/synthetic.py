"""Blocks and microbatches with random content, to measure with."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.data import Microbatch
from lopt_pp.model.block import BlockModel, block_class
from lopt_pp.model.partition import BlockSpec
from lopt_pp.model.structure import ModelStructure


def random_microbatch(shape: tuple[int, int], vocabulary: int, device: torch.device) -> Microbatch:
    """Random tokens, all of which count."""
    tokens = torch.randint(vocabulary, shape, device=device)
    positions = torch.arange(shape[1] - 1, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    return Microbatch(0, 0, tokens, tokens, mask, positions, tokens.numel(), shape[0] * (shape[1] - 1))


def random_block(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, structure: ModelStructure, spec: BlockSpec
) -> BlockModel:
    """The block at `spec` with random weights, without the rest of the model."""
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    blocks = block_class(model_class, structure, spec)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in blocks(untied).state_dict().items()}
    weights = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    block = blocks.from_pretrained(None, config=untied, state_dict=weights, dtype=torch.float32)
    return BlockModel(block, structure, spec)

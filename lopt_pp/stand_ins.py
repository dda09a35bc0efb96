"""Blocks and microbatches with random content, to measure with."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.data import Microbatch
from lopt_pp.span import Span
from lopt_pp.split import Anatomy, BlockModel, block_class


def random_microbatch(shape: tuple[int, int], vocabulary: int, device: torch.device) -> Microbatch:
    """Random tokens, all of which count."""
    tokens = torch.randint(vocabulary, shape, device=device)
    positions = torch.arange(shape[1] - 1, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    return Microbatch(0, 0, tokens, tokens, mask, positions, tokens.numel(), shape[0] * (shape[1] - 1))


def random_block(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, anatomy: Anatomy, span: Span
) -> BlockModel:
    """The block at `span` with random weights, without the rest of the model."""
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    blocks = block_class(model_class, anatomy, span)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in blocks(untied).state_dict().items()}
    weights = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    block = blocks.from_pretrained(None, config=untied, state_dict=weights, dtype=torch.float32)
    return BlockModel(block, anatomy, span)

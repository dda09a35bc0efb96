"""Blocks of a model on disk, as the trainer loads them."""

from pathlib import Path

from torch import nn
from transformers import AutoConfig

from lopt_pp.model.block import BlockModel
from lopt_pp.model.build import BlockBuilder, Keep
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights


def load(path: Path, stage: int, num_stages: int = 2, keep: Keep | None = None) -> BlockModel:
    """The block of a stage, as the trainer loads it; `keep` is of replicas that hold a share each."""
    config = AutoConfig.from_pretrained(path)
    model_class, specs = model_class_of(config), split_evenly(config.num_hidden_layers, num_stages)
    builder = BlockBuilder(model_class, config, check_split(model_class, config, specs))
    return builder.from_pretrained(specs[stage], PretrainedWeights(str(path)), keep=keep)


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of an embedding, a norm or a linear map."""
    return module.get_parameter("weight")

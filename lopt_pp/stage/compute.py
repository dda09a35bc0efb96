"""How a stage computes: dtypes, gradient checkpointing, compilation; and what makes a block compute so."""

import torch
from transformers import PreTrainedModel

from lopt_pp.config.compute import StageConfig
from lopt_pp.model.block import BlockModel
from lopt_pp.objectives import Objective


def prepare_block(block: BlockModel, config: StageConfig, device: torch.device) -> BlockModel:
    """Moves a block to where it is to train, and makes it compute as it is told to."""
    block.to(device, config.parameter_dtype).train()
    if config.torch_compile:
        for layer in block.layers:
            layer.compile()
    if config.gradient_checkpointing:
        checkpoint_layers(block.model)
    return block


def prepare_objective(objective: Objective, config: StageConfig, device: torch.device) -> None:
    """Does the same for an objective, and for what it may have of further layers."""
    objective.to(device, config.parameter_dtype).train()
    for part in objective.modules():
        if isinstance(part, BlockModel):
            prepare_block(part, config, device)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Has each layer keep only its input. (The method's name is another before transformers 5.20.)"""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})

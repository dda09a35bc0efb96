"""How a stage computes: dtypes, gradient checkpointing, compilation; and what makes a block compute so."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.neftune import neftune_post_forward_hook

from lopt_pp.config.compute import StageConfig
from lopt_pp.model.block import BlockModel
from lopt_pp.model.dtypes import cast_parameters
from lopt_pp.model.experts import autocast_experts
from lopt_pp.objectives import Objective
from lopt_pp.util.compat_transformers import recompute_as_told


def prepare_block(block: BlockModel, config: StageConfig, device: torch.device) -> BlockModel:
    """Moves a block to where it is to train, and makes it compute as it is told to."""
    cast_parameters(block, device, config.parameter_dtype)
    block.train()
    if config.autocasts:
        autocast_experts(block.model)
    if config.neftune_noise_alpha and block.spec.is_first:
        embeddings: Any = block.model.get_input_embeddings()
        embeddings.neftune_noise_alpha = config.neftune_noise_alpha
        embeddings.register_forward_hook(neftune_post_forward_hook)
    if config.compiles:
        given = {"backend": config.torch_compile_backend, "mode": config.torch_compile_mode}
        how: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        for layer in block.layers:
            layer.compile(**how)
    if config.gradient_checkpointing:
        checkpoint_layers(block.model)
    return block


def prepare_objective(objective: Objective, config: StageConfig, device: torch.device) -> None:
    """Does the same for an objective, and for what it may have of further layers."""
    cast_parameters(objective, device, config.parameter_dtype)
    objective.train()
    for part in objective.modules():
        if isinstance(part, BlockModel):
            prepare_block(part, config, device)


@contextlib.contextmanager
def measuring(modules: Sequence[nn.Module], compiles: bool) -> Iterator[None]:
    """While it lasts, modules compute without dropout and without a gradient; afterwards they are as they were.

    Args:
        modules: all of them, those within others included.
        compiles: whether layers among them are compiled. They run as they are, since they would be compiled once more
            for other shapes.
    """
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    eager = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Has each layer keep only its input. (The method's name is another before transformers 5.20.)"""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": recompute_as_told})

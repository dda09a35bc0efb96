"""The smallest configs of the model families whose split is proved."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    # Five layers, so that layers of full attention are not the last of a pattern alone.
    "gemma2": {"head_dim": 32, "sliding_window": 4, "num_hidden_layers": 5},
    "gemma3_text": {"head_dim": 32, "sliding_window": 4, "num_hidden_layers": 7},
    "phi3": {},
    "olmo2": {},
    "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    "smollm3": {"num_hidden_layers": 5},
    "cohere2": {"sliding_window": 4, "num_hidden_layers": 5},
    "gpt_neox": {},
    "gpt2": {},
    # A dense layer among mixtures of experts, known by its number.
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [2],
    },
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The smallest config of a family."""
    if family == "gpt2":
        settings: dict[str, Any] = {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "vocab_size": 128,
            "n_embd": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 128,
        } | changes
        return CONFIG_MAPPING[family](**settings)
    return CONFIG_MAPPING[family](**{**_COMMON, **FAMILIES[family], **changes})


def leave_out(whole: PreTrainedModel, layers: str, numbers: Sequence[int]) -> None:
    """Lets hidden states pass by layers of a whole model."""

    def passing(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        return entered if isinstance(output, torch.Tensor) else (entered, *output[1:])

    for number in numbers:
        whole.get_submodule(f"{layers}.{number}").register_forward_hook(passing, with_kwargs=True)

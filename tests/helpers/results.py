"""What a run has left."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model, in one file or in shards."""
    files = sorted(directory.glob("model*.safetensors"))
    assert files, f"{directory} holds no model"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def load_model(directory: Path, **options: Any) -> PreTrainedModel:
    """The saved model, as a user loads it; nothing that it needs may lack, and nothing may be left over."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    model, info = loaded
    assert not any(info.values()), info
    return model

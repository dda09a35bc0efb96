"""What a run has left."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model, in one file or in shards."""
    files = sorted(directory.glob("model*.safetensors"))
    assert files, f"{directory} holds no model"
    return {name: tensor for file in files for name, tensor in load_file(file).items()}

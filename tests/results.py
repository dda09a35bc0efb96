"""What a run has left."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model."""
    return {name: tensor for file in directory.glob("model-*.safetensors") for name, tensor in load_file(file).items()}

"""Models on disk as a test needs them: whole, in two halves, with other tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

INDEX = "model.safetensors.index.json"

Tensors = dict[str, torch.Tensor]


def write_model(path: Path, family: str = "llama", shard_size: str = "1GB", **changes: Any) -> PreTrainedModel:
    """Writes a whole model with random weights, none of them at its initial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path, max_shard_size=shard_size)
    return model


def change(path: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrites the one safetensors file of a model."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def write_halves(path: Path, **changes: Any) -> PreTrainedModel:
    """Writes a model as two files with an index, one for each of two stages."""
    model = write_model(path, tie_word_embeddings=False, **changes)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    of_first = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    files = {name: "first.safetensors" if name.startswith(of_first) else "second.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": files}))
    return model

"""Sees that a model's name leads to a whole model of `transformers`, before anything is fetched or loaded."""

import json
import re
from pathlib import Path

from lopt_pp.errors import LoptError

ADAPTER = "adapter_config.json"
"""Of a directory of peft."""

PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files of weights that are not read."""

_OF_TOKENIZER = re.compile(r"token|vocab|merges|tekken|\.model$|\.tiktoken$")
"""In the names of files of tokenizers."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def check_location(name: str, allows_adapters: bool = False) -> None:
    """Refuses a path that is not there, and directories and files that are not a whole model.

    Args:
        name: directory of a model, or its hub id.
        allows_adapters: whether the directory of an adapter will do.

    Raises:
        LoptError: what it is instead, and what to do.
    """
    path = Path(name)
    if path.is_dir():
        _check_directory(path, allows_adapters)
    elif path.suffix == ".gguf" and (path.is_file() or _is_path(name)):
        raise LoptError(_gguf(path) if path.is_file() else f"{name}: no such file")
    elif path.is_file():
        if path.suffix != ".json":  # A config, for `lopt-pp plan`.
            raise LoptError(f"{name} is a file; give the model's directory, with its config.json")
    elif _is_path(name):
        raise LoptError(f"{name}: no such directory")


def has_weights(name: str) -> bool:
    """Whether a name is a directory with safetensors weights."""
    return any(any(Path(name).glob(pattern)) for pattern in ("model.safetensors", "model.safetensors.index.json"))


def no_weights(name: str, pickled: str | None) -> str:
    """What is wrong with a model without safetensors weights.

    Args:
        name: of the model.
        pickled: the file of its pickled weights, if it has any.
    """
    reason = "none"
    if pickled is not None:
        reason = f"only pickled weights ({pickled}), which are refused since a pickle can run code"
    return (
        f"{name}: no safetensors weights (model.safetensors or model.safetensors.index.json), {reason}; convert them: "
        f"from_pretrained(), then save_pretrained()"
    )


def explain(name: str, error: str) -> str:
    """What `transformers` says where it cannot open a model or its tokenizer, with what it does not say.

    Args:
        name: of the model.
        error: the first line of what it says.
    """
    if not Path(name).exists() and "huggingface.co" in error:
        return f"there is no such directory, and as for the hub: {error}"
    if "tokenizer" in error and Path(name).is_dir() and not has_tokenizer(name):
        return no_tokenizer(name)
    return error


def has_tokenizer(directory: str) -> bool:
    """Whether there are files in a directory that a tokenizer could be made of."""
    return any(_OF_TOKENIZER.search(path.name) for path in Path(directory).iterdir())


def no_tokenizer(directory: str) -> str:
    """What is missing in a directory without a tokenizer, and where it is had from."""
    return (
        "there is no tokenizer beside the model (such as tokenizer.json and tokenizer_config.json); add that of the "
        f'model it was made from: AutoTokenizer.from_pretrained(...).save_pretrained("{directory}")'
    )


def _check_directory(path: Path, allows_adapters: bool) -> None:
    has_weights = any(any(path.glob(pattern)) for pattern in _WEIGHTS)
    whole = [file for pattern in _WEIGHTS for file in path.glob(pattern) if not file.name.startswith("adapter_")]
    if (path / ADAPTER).exists() and not whole:
        if allows_adapters:
            return
        raise LoptError(_adapter(path))
    if (path / "config.json").exists() and (has_weights or not _others(path)):
        return
    for file in sorted(path.glob("*.gguf")):
        raise LoptError(_gguf(file))
    if _others(path):
        raise LoptError(
            f"{path} holds a model for ONNX Runtime, which cannot be trained here; give the model of transformers that "
            f"it was exported from"
        )


def _others(path: Path) -> bool:
    """Whether there are files of other programs."""
    return any(any(path.glob(pattern)) for pattern in ("*.gguf", "*.onnx", "onnx/*.onnx"))


def _gguf(file: Path) -> str:
    return (
        f"{file} is a GGUF file, for llama.cpp, and its weights are mostly quantized; give the model of transformers "
        f"that it was made from, or turn it into one: "
        f'AutoModelForCausalLM.from_pretrained("{file.parent}", gguf_file="{file.name}") and '
        f"save_pretrained(DIRECTORY), the tokenizer likewise"
    )


def _adapter(path: Path) -> str:
    try:
        content = json.loads((path / ADAPTER).read_text(encoding="utf-8"))
        kind, base = str(content.get("peft_type") or "peft"), str(content.get("base_model_name_or_path") or "BASE")
    except (OSError, ValueError, AttributeError):
        kind, base = "peft", "BASE"
    return (
        f"{path} is an adapter ({kind}) of {base} and not a whole model; adapters are not supported yet. Merge it with "
        f'peft: AutoPeftModelForCausalLM.from_pretrained("{path}").merge_and_unload().save_pretrained(DIRECTORY), and '
        f"save the tokenizer there"
    )


def _is_path(name: str) -> bool:
    """Whether a name that is neither a directory nor a file can only be meant as a path.

    Hub ids are `ORGANIZATION/NAME`, or a name alone. Where such a one could be either, it is the hub's, unless its
    first part is a directory that holds a run's checkpoints or models: no organization's does.
    """
    path = Path(name)
    if name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1:
        return True
    if path.name.startswith("checkpoint-"):
        return True
    parent = path.parent
    return parent != Path() and any(any(parent.glob(own)) for own in ("config.json", "checkpoint-*", "metrics.jsonl"))

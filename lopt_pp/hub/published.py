"""Which files of a directory are published: those of a model, and nothing that only the machine is concerned with."""

from fnmatch import fnmatchcase
from pathlib import Path

from lopt_pp.errors import LoptError

PUBLISHED = (
    "README.md",
    "LICENSE*",
    "NOTICE*",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model*.safetensors.index.json",
    # Of tokenizers: what `save_pretrained` writes, under the names that the hub's own models have.
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    # Code that comes with the model.
    "*.py",
)
"""Patterns of the files that are published, relative to the model's directory. A run leaves others there, which name
its machines, paths and flags (`run.json`, `metrics.jsonl`, the trackers' files, reports), and checkpoints."""

REPLACED = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin*")
"""Patterns of weights that the repository may have of an earlier push; a model of other shards must not be beside."""


def model_files(directory: Path) -> list[str]:
    """The files of a model that are published, relative to its directory, in order.

    Args:
        directory: with a model, such as the output directory of a finished run.

    Raises:
        LoptError: it has no whole model.
    """
    files = [path for pattern in PUBLISHED for path in directory.glob(pattern) if path.is_file()]
    names = sorted({path.relative_to(directory).as_posix() for path in files})
    has_weights = any(fnmatchcase(name, "model*.safetensors") for name in names)
    if not has_weights or "config.json" not in names:
        raise LoptError(f"{directory} has no model to push; give the output directory of a finished run, or a model's")
    return names

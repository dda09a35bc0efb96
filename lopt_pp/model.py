"""All of a model but its weights: config, tokenizer, generation settings; of the pretrained one, and of the result."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lopt_pp.errors import LoptError, first_line
from lopt_pp.flags import check_types


@dataclass(frozen=True)
class ModelConfig:
    """The model to post-train."""

    _argument_group_name: ClassVar[str] = "Model"

    model_name_or_path: str = field(
        metadata={"help": "Directory or hub id of a causal language model with safetensors weights. Required."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the hub repository."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel, as in transformers: sdpa, eager, flash_attention_2, ..."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Off, unless you have read it."}
    )

    def __post_init__(self) -> None:
        check_types(self)


def load_model_config(config: ModelConfig) -> PreTrainedConfig:
    """The pretrained model's config.

    Raises:
        LoptError: there is none, or it needs code of its own that the user has not allowed.
    """
    try:
        return AutoConfig.from_pretrained(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
        )
    except (
        Exception
    ) as error:  # A config is a class that is called with whatever the file holds: anything may go wrong.
        if "trust_remote_code" in str(error):
            raise LoptError(
                f"--model_name_or_path {config.model_name_or_path} comes with Python code of its own, which is not run "
                f"unless you give --trust_remote_code; read it first"
            ) from error
        raise LoptError(f"--model_name_or_path {config.model_name_or_path}: {first_line(error)}") from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The pretrained model's tokenizer.

    Raises:
        LoptError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # The tokenizers library raises bare ones.
        raise LoptError(
            f"--model_name_or_path {config.model_name_or_path}: no tokenizer: {first_line(error)}"
        ) from error


def write_description(
    directory: Path,
    config: ModelConfig,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> None:
    """Writes all of the trained model but its weights: config, generation settings, tokenizer.

    Args:
        directory: of the model.
        config: names the pretrained model, for its generation settings.
        model_config: of the pretrained model.
        tokenizer: of the pretrained model.
        dtype: of the weights.
    """
    own = copy.deepcopy(model_config)
    own.tie_word_embeddings = False
    own.dtype = dtype
    own.save_pretrained(directory)
    try:
        generation = GenerationConfig.from_pretrained(config.model_name_or_path, revision=config.model_revision)
    except OSError:  # It has none.
        generation = GenerationConfig.from_model_config(own)
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

"""The models and rows that the benchmarks train, made at random, and the optimizer that trains them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import TokenizedRows
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.structure import ModelStructure
from lopt_pp.model.verify import check_split

OPTIM = OptimConfig(learning_rate=1e-6, lr_scheduler_type="constant")
MANY_STEPS = 10**9
"""The length of the run for schedules of learning rates; the one here is constant."""

SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}

SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

MEDIUM: dict[str, Any] = {**SMALL, "vocab_size": 8192, "num_hidden_layers": 12}

TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Format:
    """A model and the microbatches that it is trained on.

    Attributes:
        config: of the Llama architecture.
        rows: of a microbatch.
        tokens: of a row.
        trial: microbatches that make a measurement long enough to be told from noise.
    """

    config: dict[str, Any]
    rows: int
    tokens: int
    trial: int


FORMATS = {
    "smollm2-135m": Format(SMOLLM2_135M, rows=2, tokens=256, trial=1),
    "small": Format(SMALL, rows=2, tokens=256, trial=4),
    "medium": Format(MEDIUM, rows=2, tokens=256, trial=4),
    "short": Format(SMALL, rows=1, tokens=64, trial=16),
    "tiny": Format(TINY, rows=2, tokens=32, trial=2),
}


def model_config(model: str) -> LlamaConfig:
    """Of a model of `FORMATS`, whose first and last block own an embedding each."""
    return LlamaConfig(**{**FORMATS[model].config, "tie_word_embeddings": False})


def model_structure(model: str) -> ModelStructure:
    """Of a model of `FORMATS`, cut in the middle."""
    config = model_config(model)
    return check_split(LlamaForCausalLM, config, split_evenly(config.num_hidden_layers, 2))


def random_rows(vocabulary: int, tokens: int, number: int) -> TokenizedRows:
    """Rows of random tokens in memory, all of one length, each token a target."""
    ids = np.random.default_rng(0).integers(3, vocabulary, (number, tokens)).tolist()
    columns = {"input_ids": ids, "labels": ids, "length": [tokens] * number, "num_targets": [tokens - 1] * number}
    return TokenizedRows(Dataset.from_dict(columns), "random tokens", {})


def write_model(path: Path, config: PreTrainedConfig | None = None) -> Path:
    """Writes a model with random weights (by default of the shapes of SmolLM2-135M), and a tokenizer of its size."""
    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2_135M) if config is None else config
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    vocabulary = {f"t{number}": number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1", pad_token="t2").save_pretrained(path)
    return path


def write_rows(path: Path, vocabulary: int, tokens: int, number: int) -> Path:
    """Writes rows of random tokens, all of one length, each token a target."""
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(number):
            ids = draw.integers(3, vocabulary, tokens).tolist()
            file.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return path

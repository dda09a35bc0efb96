"""A model with random weights, a tokenizer of bytes and rows of sums, made on the spot: nothing is downloaded."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>")
"""Of padding, of a text's beginning and of its end; before the bytes."""


def write_model(path: Path, layers: int, hidden: int, positions: int = 256) -> None:
    """Writes a small Llama.

    Args:
        path: of the folder.
        layers: number of them.
        hidden: size of the hidden states; a multiple of 64.
        positions: tokens of the longest row.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*_SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, begin, end = _SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end, model_max_length=positions
    ).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=-(-len(vocabulary) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(path)


def write_rows(path: Path, number: int, terms: tuple[int, int] = (1, 4)) -> None:
    """Writes sums as questions and answers.

    Args:
        path: of the file.
        number: of rows.
        terms: of each sum, at least and at most: rows have different lengths.
    """
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            numbers = [draw.randrange(100) for _ in range(draw.randint(*terms))]
            row = {"prompt": " + ".join(map(str, numbers)) + " = ", "completion": str(sum(numbers))}
            file.write(json.dumps(row) + "\n")

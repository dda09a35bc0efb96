"""A tiny model with a tokenizer, and rows to train it on, as files; conftest.py has fixtures of them."""

import json
import random
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Protocol

import torch
from families import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

DATED = "{{ 'today is ' + strftime_now('%Y-%m-%d') + '\n' }}" + CHATML


def write_model(path: Path, family: str = "llama", **changes: object) -> Path:
    """Writes a model with random weights and a character tokenizer with a chat template."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    model.save_pretrained(path)
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>"]
    vocab = {token: number for number, token in enumerate([*special, *ascii_lowercase, *"0123456789 +=?\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        chat_template=CHATML,
    ).save_pretrained(path)
    return path


def write_rows(path: Path, number: int = 40, seed: int = 0) -> Path:
    """Writes sums of one to four numbers as questions and answers: rows of different lengths."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(number):
            terms = [draw.randrange(100) for _ in range(draw.randint(1, 4))]
            row = {"question": "what is " + " + ".join(map(str, terms)) + "?", "answer": str(sum(terms))}
            file.write(json.dumps(row) + "\n")
    return path


def write_inputs(folder: Path, rows: int = 40, **changes: Any) -> Path:
    """Writes what a run needs into a folder: `model` (a Llama with changes) and `rows.jsonl`."""
    write_model(folder / "model", **changes)
    write_rows(folder / "rows.jsonl", rows)
    return folder


class InputsWith(Protocol):
    """See `write_inputs`; the fixture `inputs_with` chooses the folder."""

    def __call__(self, rows: int = 40, **changes: object) -> Path: ...

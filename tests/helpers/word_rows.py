"""A tokenizer of a few words, and files of rows that are made of them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lopt_pp.data import DataConfig, TokenizedRows, load_rows

SHORT = """\
{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% if m.role == 'assistant' %}{{ '<eos>' }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"""

WORDS = ["<eos>", "one", "two", "three", "None", "007", "user", "assistant"]

EOS, ONE, TWO, THREE, NONE, SEVEN, USER, ASSISTANT = range(8)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token is a word of `WORDS`."""
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<eos>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, max_length: int = 64, **flags: Any) -> TokenizedRows:
    rows = load_rows(DataConfig(train_file=[str(path)], max_length=max_length, **flags), tokenizer)
    assert isinstance(rows, TokenizedRows)
    return rows


def pairs(rows: TokenizedRows) -> list[tuple[list[int], list[int]]]:
    return [(rows[i].input_ids, rows[i].labels) for i in range(len(rows))]


ROWS = [{"prompt": "one", "completion": "two"}, {"prompt": "three", "completion": "None"}]

EXPECTED = [([ONE, TWO, EOS], [-100, TWO, EOS]), ([THREE, NONE, EOS], [-100, NONE, EOS])]

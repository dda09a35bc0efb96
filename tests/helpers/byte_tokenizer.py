"""A tokenizer that encodes any text, chat templates of several kinds for it, and what comes of a file of rows by it."""

import functools
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lopt_pp.data import DataConfig, TokenizedRows, load_rows
from lopt_pp.data.streaming import StreamedRows
from lopt_pp.errors import LoptError

PLAIN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
TEMPLATES = {
    "none": None,
    "plain": PLAIN + "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    "marked": "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<end>' }}{% endgeneration %}{% else %}{{ m['content'] + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    # As careless of what a message holds as the templates of real models are.
    "careless": PLAIN + "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '!' }}"
    "{{ m.tool_calls | length }}{{ 1 // (m.tool_calls | length - 1) }}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    "rewriting": "{{ messages | length }}" + PLAIN,
}


@functools.cache
def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, so that there is no text that it could not encode; and one that ends a turn of the template."""
    end = next((mark for mark in ("<|im_end|>", "<|eot_id|>") if mark in (template or "")), "<end>")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({token: number for number, token in enumerate([*letters, end])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=end, chat_template=template)


def outcome(path: Path, template: str | None, streaming: bool) -> object:
    """The tokens and labels of a file's rows, and what was left out of them and why; or the error, without the file."""
    try:
        rows = load_rows(DataConfig(train_file=[str(path)], streaming=streaming), tokenizer(template))
        if not isinstance(rows, StreamedRows):
            assert isinstance(rows, TokenizedRows)
            encoded = [rows[index] for index in range(len(rows))]
            return [(row.input_ids, row.labels) for row in encoded], sorted(rows.dropped.items())
        packs = rows.fetch(np.arange(len(rows)))
        dropped = Counter(rows._dropped.values())
        encoded = [row for pack in packs for row in pack.read()]
        return [(row.input_ids, row.labels) for row in encoded], sorted(dropped.items())
    except LoptError as error:
        text = re.sub(r" \(line \d+\)", "", str(error).replace(str(path), "FILE"))
        text = text.split("; nor can these be used: ")[0]  # Which is said of the others of a step.
        return "none can be used" if text.startswith("none of ") else text

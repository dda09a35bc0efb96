"""TRL's chat templates, tokenizers for them, and what TRL trains on of a conversation."""

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational

from lopt_pp.data.encoding import EncodedRow
from lopt_pp.data.formats import IGNORE_INDEX

_FOLDER = Path(trl.__file__).parent / "chat_templates"

NAMES = sorted(path.stem for path in _FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
"""Of the templates as models have them."""

_OF_PARTS = ("idefics3", "llava_next", "smolvlm")
"""Take the content of messages in parts only."""

_SPECIAL = re.compile(r"<\|?[^\s<>{}'\"|=]+\|?>|<｜[^>]*?｜>|\[/?[A-Z_]+\]")


def source(name: str) -> str:
    """A template."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def _special_tokens() -> list[str]:
    return sorted({token for name in NAMES for token in _SPECIAL.findall(source(name))})


def tokenizer_for(template: str, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """A token for each byte, for each pair that is merged, and for what templates put around turns."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "▁", " ", "\n"]
    vocabulary = [*letters, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in ("<eos>", "<bos>", *_special_tokens())]
    tokenizer.add_special_tokens(added)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", chat_template=template
    )


def trained_by_trl(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], name: str) -> EncodedRow:
    """What SFTTrainer trains on with `assistant_only_loss`.

    Raises:
        Exception: the template refuses the row, or TRL cannot train with it (a ValueError).
    """
    template = None if has_generation_markers(source(name)) else get_training_chat_template(tokenizer)
    messages = [message for column in ("messages", "prompt", "completion") for message in row.get(column, ())]
    options: Any = {"chat_template": template, "return_dict": True, "tools": row.get("tools")}
    encoded: Any = tokenizer.apply_chat_template(_fit(messages, name), return_assistant_tokens_mask=True, **options)
    input_ids, mask = encoded["input_ids"], list(encoded["assistant_masks"])
    if "prompt" in row:
        prompt: Any = tokenizer.apply_chat_template(_fit(row["prompt"], name), add_generation_prompt=True, **options)
        pairs = zip(prompt["input_ids"], input_ids, strict=False)
        start = next((n for n, (first, second) in enumerate(pairs) if first != second), len(prompt["input_ids"]))
        mask[:start] = [0] * start
    labels = [token if counts else IGNORE_INDEX for token, counts in zip(input_ids, mask, strict=True)]
    return EncodedRow(input_ids, labels)


def prepared_by_trl(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **flags: Any) -> EncodedRow:
    """What SFTTrainer makes of a row with these flags of SFTConfig, without a model.

    Raises:
        ValueError: its constructor would refuse them.
    """
    given = {"assistant_only_loss": False, "completion_only_loss": None, **flags}
    rows = Dataset.from_list([row])
    completion_only = given["completion_only_loss"]
    if given["assistant_only_loss"] and not is_conversational(row):
        raise ValueError("not conversational")
    template = tokenizer.chat_template
    marked = given["assistant_only_loss"] and not has_generation_markers(template)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=get_training_chat_template(tokenizer) if marked else None,
        completion_only_loss={"prompt", "completion"} <= row.keys() if completion_only is None else completion_only,
    )
    usual = {"dataset_num_proc": None, "dataset_text_field": "text", "max_length": None, "shuffle_dataset": False}
    args = SimpleNamespace(**(usual | given))
    prepared: Any = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "train")  # type: ignore[arg-type]
    return EncodedRow(prepared[0]["input_ids"], prepared[0]["labels"])


def decoded(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    """The text of a row, with [[ ]] around what counts."""
    text, counts = "", False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if (label != IGNORE_INDEX) != counts:
            counts = not counts
            text += "[[" if counts else "]]"
        text += str(tokenizer.decode([token]))
    return text + ("]]" if counts else "")


def _fit(messages: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    if name not in _OF_PARTS:
        return messages
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]

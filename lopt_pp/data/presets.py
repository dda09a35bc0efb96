"""`--dataset_mapping`: what a raw row is, where its columns do not say it: a preset by name, or a function."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lopt_pp.config.presets import PRESETS
from lopt_pp.data.formats import Conversation, Format, Pair, Reader, Row, read_row
from lopt_pp.errors import LoptError
from lopt_pp.util.user_code import describe, load_user_function, source_digest

# The prompts of Stanford Alpaca, https://github.com/tatsu-lab/stanford_alpaca, which MetaMath uses too.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)

# What Tulu 3 was trained on, https://huggingface.co/allenai/Llama-3.1-Tulu-3-8B, with marks on the answers.
_TULU_TEMPLATE = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '' if loop.last else '\n' }}{% else %}\
{{ message['content'] + '\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""


@dataclass(frozen=True)
class Preset:
    """How the rows of a data set that is known by name are read; `lopt_pp.config.presets.PRESETS` says where it is.

    Attributes:
        read: what its rows are.
        chat_template: for a tokenizer without one.
    """

    read: Reader
    chat_template: str | None = None


def _columns(row: Row, *names: str) -> list[str]:
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if missing:
        raise LoptError(f"it has no string `{missing[0]}` (it has: {', '.join(row)})")
    return [row[name] for name in names]


def _others(row: Row, *used: str) -> tuple[str, ...]:
    return tuple(name for name, value in row.items() if name not in used and value not in (None, "", [], {}))


def _metamathqa(row: Row) -> Format:
    query, response = _columns(row, "query", "response")
    return Pair(query, response, _ALPACA.format(instruction=query), unused=_others(row, "query", "response"))


def _alpaca(row: Row) -> Format:
    instruction, output = _columns(row, "instruction", "output")
    unused = _others(row, "instruction", "input", "output")
    if not row.get("input"):
        return Pair(instruction, output, _ALPACA.format(instruction=instruction), unused=unused)
    (more,) = _columns(row, "input")
    plain = _ALPACA_WITH_INPUT.format(instruction=instruction, input=more)
    return Pair(f"{instruction}\n\n{more}", output, plain, unused=unused)


def _tulu3(row: Row) -> Format:
    shape = read_row({"messages": row.get("messages")})
    assert isinstance(shape, Conversation)
    return dataclasses.replace(shape, unused=_others(row, "messages"))


def _gsm8k(row: Row) -> Format:
    question, answer = _columns(row, "question", "answer")
    return Pair(question, answer, f"Question: {question}\nAnswer: ", unused=_others(row, "question", "answer"))


_READERS = {
    "metamathqa": Preset(_metamathqa),
    "alpaca": Preset(_alpaca),
    "tulu3": Preset(_tulu3, _TULU_TEMPLATE),
    "gsm8k": Preset(_gsm8k),
}


def find_preset(mapping: str | None) -> Preset | None:
    """The preset that `--dataset_mapping` names; None where it names none."""
    return _READERS[mapping] if mapping in PRESETS else None


def find_reader(mapping: str | None, text_field: str) -> tuple[Reader, str]:
    """How rows are read, by `--dataset_mapping`.

    Args:
        mapping: a preset's name, or `package.module:function` of the user's: it takes a row as a dict, and returns one
            with the columns of a shape that `read_row` knows, or None to leave the row out.
        text_field: of rows of plain text.

    Returns:
        The reader, and a text that changes when the user's code does, so that what is cached can go by it.

    Raises:
        LoptError: there is no such preset, module or function.
    """
    by_columns = functools.partial(read_row, text_field=text_field)
    if mapping is None:
        return by_columns, ""
    if (preset := find_preset(mapping)) is not None:
        return preset.read, mapping
    what = f"one of {', '.join(PRESETS)}, or a function of yours as package.module:function"
    function = load_user_function("--dataset_mapping", mapping, what)
    version = source_digest(mapping)
    return functools.partial(_read_mapped, function=function, name=mapping, by_columns=by_columns), version


def _read_mapped(
    row: Row, function: Callable[[dict[str, Any]], Any], name: str, by_columns: Callable[[Row], Format]
) -> Format | None:
    try:
        mapped = function(dict(row))
    except Exception as error:  # Whatever the user's function may raise.
        raise LoptError(f"--dataset_mapping {name} fails: {describe(error)}") from error
    if mapped is None:
        return None
    if not isinstance(mapped, dict):
        raise LoptError(f"--dataset_mapping {name} returns {type(mapped).__name__}; let it return a dict, or None")
    return by_columns(mapped)

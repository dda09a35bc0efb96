"""What the columns of a raw row say it is: a conversation, a prompt with its answer, a text, or tokens."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl import maybe_convert_to_chatml

from lopt_pp.errors import LoptError, shown

IGNORE_INDEX = -100
"""The label of a token that takes no part in the loss (as in `torch.nn.functional.cross_entropy`)."""

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

_PAIRS = (("question", "answer"), ("query", "response"), ("problem", "solution"), ("instruction", "output"))

FORMATS = ("input_ids", "messages", "conversations", "prompt + completion", *map(" + ".join, _PAIRS), "text")

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: each with `role` and `content`, at least.
        prompt_length: how many of them are the prompt of a completion; 0 of a conversation that is not such a pair.
        options: what else the template is given, such as `tools`.
    """

    messages: Messages
    prompt_length: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer.

    Attributes:
        prompt: the user's turn, for a tokenizer with a chat template.
        completion: the answer.
        plain: all that comes before the answer, for a tokenizer without a chat template.
    """

    prompt: str
    completion: str
    plain: str


@dataclass(frozen=True)
class Text:
    """A text without parts."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids and their labels, one each."""

    input_ids: list[int]
    labels: list[int]


Format = Conversation | Pair | Text | Tokens

Reader = Callable[[Row], Format | None]
"""Makes of a raw row what it is to be trained on as; None leaves the row out."""


def read_row(row: Row, text_field: str = "text") -> Format:
    """The shape of a raw row. The columns that are not None decide, by the first of these that fits:

    - `input_ids`, and `labels` or the masks of TRL (`completion_mask`, `assistant_masks`): used as they are.
    - `messages`, a list of `{"role": ..., "content": ...}`; or `conversations`, which may have the `from` and `value`
      of ShareGPT instead.
    - `prompt` and `completion`, two strings or two lists of messages.
    - `question` and `answer`; `query` and `response` (MetaMathQA); `problem` and `solution`.
    - `instruction` and `output`, optionally `input`, which a blank line parts from the instruction (Alpaca).
    - `text`, or another column that `text_field` names.

    Conversations may have `tools` (a list, or JSON of one) and `chat_template_kwargs` besides, as in TRL.

    Raises:
        LoptError: the row has no usable columns, or a column does not hold what it should. The text does not say
            which row: the caller knows.
    """
    row = {column: value for column, value in row.items() if value is not None}
    if "input_ids" in row:
        return _tokens(row)
    if "messages" in row or "conversations" in row:
        column = "messages" if "messages" in row else "conversations"
        return Conversation(_messages(row, column), options=_template_options(row))
    if {"prompt", "completion"} <= row.keys():
        if isinstance(row["prompt"], str):
            return Pair(row["prompt"], _string(row, "completion"), row["prompt"])
        context = _messages(row, "prompt")
        completion = _messages(row, "completion")
        return Conversation(context + completion, prompt_length=len(context), options=_template_options(row))
    for ask, reply in _PAIRS:
        if {ask, reply} <= row.keys():
            prompt = _string(row, ask)
            if ask == "instruction" and row.get("input"):
                prompt += "\n\n" + _string(row, "input")
            return Pair(prompt, _string(row, reply), prompt + "\n")
    if text_field in row:
        return Text(_string(row, text_field))
    columns = ", ".join(row) if row else "none that is filled"
    raise LoptError(
        f"no usable columns (it has: {columns}); a row needs {'; or '.join((*FORMATS[:-1], text_field))}; "
        f"--dataset_mapping can make these of others"
    )


def _tokens(row: Row) -> Tokens:
    input_ids = _integers(row, "input_ids")
    if "labels" in row:
        labels = _integers(row, "labels")
        if len(input_ids) != len(labels):
            raise LoptError(
                f"`input_ids` has {len(input_ids)} entries and `labels` {len(labels)}; give one label a token"
            )
        return Tokens(input_ids, labels)
    labels = input_ids
    for column in ("completion_mask", "assistant_masks"):
        if column in row:
            mask = _integers(row, column)
            if len(input_ids) != len(mask):
                raise LoptError(
                    f"`input_ids` has {len(input_ids)} entries and `{column}` {len(mask)}; give one a token"
                )
            labels = [label if counts else IGNORE_INDEX for label, counts in zip(labels, mask, strict=True)]
    return Tokens(input_ids, labels)


def _integers(row: Row, column: str) -> list[int]:
    values = row[column]
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise LoptError(f"`{column}` must be a list of integers, but is {_shown(values)}")
    return values


def _string(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise LoptError(f"`{column}` must be a string, but is {_shown(row[column])}")
    return row[column]


def _messages(row: Row, column: str) -> Messages:
    """The messages of a column, with `role` and `content`, and without entries that are None."""
    given = row[column]
    if not isinstance(given, list):
        expected = "a list of messages" + (", as `prompt` is" if column == "completion" else "")
        raise LoptError(f"`{column}` must be {expected}, but is {_shown(given)}")
    # TRL renames in place, and tables fill what one message has and another lacks with None.
    copied = [copy.copy(message) for message in given]
    messages = maybe_convert_to_chatml({"messages": copied})["messages"]
    checked = []
    for number, (message, original) in enumerate(zip(messages, given, strict=True), 1):
        message = (
            {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
        )
        if "tool_calls" in message:
            message.setdefault("content", "")
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise LoptError(
                f"message {number} of `{column}` must have the strings `role` and `content`, but is {_shown(original)}"
            )
        if isinstance(original, dict) and "from" in original:
            message["role"] = _SHAREGPT_ROLES.get(message["role"], message["role"])
        checked.append(message)
    return checked


def _template_options(row: Row) -> dict[str, Any]:
    tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise LoptError(f"`tools` must be a list or JSON of one, but is {_shown(tools)}") from error
    if not isinstance(options, dict):
        raise LoptError(f"`chat_template_kwargs` must be a mapping, but is {_shown(options)}")
    return ({"tools": tools} if tools else {}) | {key: value for key, value in options.items() if value is not None}


def _shown(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"

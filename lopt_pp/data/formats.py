"""What the columns of a raw row say it is: a conversation, a prompt with its answer, a text, or tokens."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lopt_pp.data.messages import Messages, Turns, read_messages, without_nulls
from lopt_pp.data.tools import read_tools
from lopt_pp.errors import LoptError, shown_with_type

IGNORE_INDEX = -100
"""The label of a token that takes no part in the loss (as in `torch.nn.functional.cross_entropy`)."""

Row = Mapping[str, Any]

_PAIRS = (("question", "answer"), ("query", "response"), ("problem", "solution"), ("instruction", "output"))

FORMATS = ("input_ids", "messages", "conversations", "prompt + completion", *map(" + ".join, _PAIRS), "text")

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Attributes:
        messages: each with `role` and `content`, at least.
        prompt_length: how many of them are the prompt of a completion; 0 of a conversation that is not such a pair.
        options: what else the template is given, such as `tools`.
        skipped: the numbers of the answers that the row says are not to be learned.
        unused: the columns that nothing was made of.
    """

    messages: Messages
    prompt_length: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    skipped: frozenset[int] = frozenset()
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Pair:
    """A prompt and its answer.

    Attributes:
        prompt: the user's turn, for a tokenizer with a chat template.
        completion: the answer.
        plain: all that comes before the answer, for a tokenizer without a chat template.
        options: what else a chat template is given, such as `tools`.
        unused: the columns that nothing was made of.
    """

    prompt: str
    completion: str
    plain: str
    options: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Text:
    """A text without parts."""

    text: str
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Tokens:
    """Token ids and their labels, one each.

    Attributes:
        input_ids: the tokens.
        labels: of these, -100 where no loss counts.
        with_prompt: the labels where a completion's prompt counts, too; None where the row does not say which it is.
        is_masked: whether the row says what counts, as a label for each token or as a mask of the assistant's.
    """

    input_ids: list[int]
    labels: list[int]
    with_prompt: list[int] | None = field(default=None, compare=False)
    is_masked: bool = field(default=False, compare=False)
    unused: tuple[str, ...] = field(default=(), compare=False)


Format = Conversation | Pair | Text | Tokens

Reader = Callable[[Row], Format | None]
"""Makes of a raw row what it is to be trained on as; None leaves the row out."""


def read_row(row: Row, text_field: str = "text") -> Format:
    """The shape of a raw row. The columns that are not None decide, by the first of these that fits:

    - `input_ids`, and `labels` or the masks of TRL (`completion_mask`, `assistant_masks`): used as they are, without
      the padding at their ends that an `attention_mask` leaves out.
    - `messages`, a list of `{"role": ..., "content": ...}`; or `conversations`, which may have the `from` and `value`
      of ShareGPT instead (see `read_messages`).
    - `prompt` and `completion`, two strings or two lists of messages.
    - `question` and `answer`; `query` and `response` (MetaMathQA); `problem` and `solution`.
    - `instruction` and `output`, optionally `input`, which a blank line parts from the instruction (Alpaca).
    - `text`, or another column that `text_field` names.

    All but tokens and texts may have `tools` (a list, or JSON of one) and `chat_template_kwargs` besides, as in TRL,
    and `system`, the system message. A prompt and its answer may have `history`, a list of earlier questions with their
    answers (LLaMA-Factory, ms-swift); with a `system` or a `history` they are a conversation.

    Raises:
        LoptError: the row has no usable columns, or a column does not hold what it should. The text does not say
            which row: the caller knows.
    """
    columns = _Columns(row)
    shape = _shape(columns, text_field)
    return dataclasses.replace(shape, unused=columns.unused())


class _Columns:
    """The columns of a row that are not None, and which of them were asked for."""

    def __init__(self, row: Row) -> None:
        self._row = {column: value for column, value in row.items() if value is not None}
        self._used: set[str] = set()

    def __contains__(self, column: str) -> bool:
        return column in self._row

    def __iter__(self) -> Any:
        return iter(self._row)

    def get(self, column: str) -> Any:
        """The value of a column, None where there is none; it counts as used."""
        self._used.add(column)
        return self._row.get(column)

    def string(self, column: str) -> str:
        value = self.get(column)
        if not isinstance(value, str):
            raise LoptError(f"`{column}` must be a string, but is {shown_with_type(value)}")
        return value

    def integers(self, column: str) -> list[int]:
        values = self.get(column)
        kinds = (int, bool) if "mask" in column else (int,)
        if not isinstance(values, list) or any(type(value) not in kinds for value in values):
            raise LoptError(f"`{column}` must be a list of integers, but is {shown_with_type(values)}")
        return values

    def unused(self) -> tuple[str, ...]:
        return tuple(c for c, value in self._row.items() if c not in self._used and value not in ("", [], {}))


def _shape(columns: _Columns, text_field: str) -> Format:
    if "input_ids" in columns:
        return _tokens(columns)
    if "messages" in columns or "conversations" in columns:
        column = "messages" if "messages" in columns else "conversations"
        turns = _messages(columns, column)
        return _conversation(columns, turns, bare_tools=_is_sharegpt(columns.get(column)))
    if "prompt" in columns and "completion" in columns:
        if isinstance(columns.get("prompt"), str):
            prompt = columns.string("prompt")
            return _pair(columns, prompt, columns.string("completion"), prompt)
        context = _messages(columns, "prompt")
        completion = _messages(columns, "completion")
        length = len(context.messages)
        skipped = context.skipped | {length + number for number in completion.skipped}
        return _conversation(columns, Turns(context.messages + completion.messages, skipped), prompt_length=length)
    for ask, reply in _PAIRS:
        if ask in columns and reply in columns:
            prompt = columns.string(ask)
            if ask == "instruction" and columns.get("input"):
                prompt += "\n\n" + columns.string("input")
            return _pair(columns, prompt, columns.string(reply), prompt + "\n")
    if text_field in columns:
        return Text(columns.string(text_field))
    named = ", ".join(columns) or "none that is filled"
    raise LoptError(
        f"no usable columns (it has: {named}); a row needs {'; or '.join((*FORMATS[:-1], text_field))}; "
        f"--dataset_mapping can make these of others"
    )


def _tokens(columns: _Columns) -> Tokens:
    input_ids = columns.integers("input_ids")

    def for_each_token(column: str) -> list[int]:
        values = columns.integers(column)
        if len(values) != len(input_ids):
            raise LoptError(f"`input_ids` has {len(input_ids)} entries and `{column}` {len(values)}; give one a token")
        return values

    labels = for_each_token("labels") if "labels" in columns else input_ids
    with_prompt = None
    for column in ("assistant_masks", "completion_mask") if "labels" not in columns else ():
        if column in columns:
            with_prompt = labels if column == "completion_mask" else None
            mask = for_each_token(column)
            labels = [label if counts else IGNORE_INDEX for label, counts in zip(labels, mask, strict=True)]
    start, stop = 0, len(input_ids)
    if "attention_mask" in columns:
        # What it leaves out at the ends is padding, which must not be learned: rows are padded anew.
        attended = [place for place, value in enumerate(for_each_token("attention_mask")) if value]
        start, stop = (attended[0], attended[-1] + 1) if attended else (0, 0)
        if stop - start > len(attended):
            raise LoptError("its `attention_mask` leaves out tokens between others, and not only padding at the ends")
    is_masked = "labels" in columns or "assistant_masks" in columns
    return Tokens(
        input_ids[start:stop],
        labels[start:stop],
        with_prompt=None if with_prompt is None else with_prompt[start:stop],
        is_masked=is_masked,
    )


def _pair(columns: _Columns, prompt: str, completion: str, plain: str) -> Pair | Conversation:
    earlier = _history(columns)
    if not earlier and not columns.get("system"):
        _refuse_media(columns)
        return Pair(prompt, completion, plain, _template_options(columns, bare_tools=True))
    asked = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _conversation(columns, Turns(earlier + asked), bare_tools=True)


def _history(columns: _Columns) -> Messages:
    """The questions before a prompt, and their answers."""
    history = columns.get("history") or []
    messages = []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise LoptError(f"`history` must be a list of pairs [question, answer], but holds {shown_with_type(turn)}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def _conversation(columns: _Columns, turns: Turns, prompt_length: int = 0, bare_tools: bool = False) -> Conversation:
    """A conversation, with the system message of a column of its own."""
    _refuse_media(columns)
    messages, skipped = turns.messages, turns.skipped
    if columns.get("system"):
        system = columns.string("system")
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
            skipped = frozenset(number + 1 for number in skipped)
            prompt_length += 1 if prompt_length else 0
        elif messages[0]["content"] != system:
            raise LoptError("it has a column `system` and another system message as its first; keep one of them")
    return Conversation(messages, prompt_length, _template_options(columns, bare_tools), skipped)


def _messages(columns: _Columns, column: str) -> Turns:
    given = columns.get(column)
    if not isinstance(given, list):
        expected = "a list of messages" + (", as `prompt` is" if column == "completion" else "")
        raise LoptError(f"`{column}` must be {expected}, but is {shown_with_type(given)}")
    return read_messages(given, column)


def _is_sharegpt(messages: Any) -> bool:
    return any(message.get("from") is not None for message in messages if isinstance(message, dict))


def _refuse_media(columns: _Columns) -> None:
    for column in _MEDIA:
        if column in columns and columns.get(column) not in ("", []):
            raise LoptError(
                f"its column `{column}` holds more than text, and only text is trained on; leave the row out"
            )


def _template_options(columns: _Columns, bare_tools: bool = False) -> dict[str, Any]:
    options = columns.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise LoptError(f"`chat_template_kwargs` must be a mapping, but is {shown_with_type(options)}")
    tools = read_tools(columns.get("tools"), "tools", bare_tools)
    if not tools and "functions" in columns:  # OpenAI's, before there were tools.
        tools = read_tools(columns.get("functions"), "functions", are_bare=True)
    try:
        return ({"tools": tools} if tools else {}) | without_nulls(options)
    except RecursionError as error:
        raise LoptError("`chat_template_kwargs` lies too deep in itself") from error

"""Turns one raw row of a data set into token ids and labels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from lopt_pp.errors import LoptError, first_line, shown

IGNORE_INDEX = -100
"""The label of a token that takes no part in the loss (as in `torch.nn.functional.cross_entropy`)."""

SHAPES = (
    "input_ids + labels",
    "messages",
    "prompt + completion",
    "question + answer",
    "instruction (+ input) + output",
    "text",
)

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model sees it.

    Attributes:
        input_ids: the token ids.
        labels: as long and aligned with `input_ids` (the loss shifts them), -100 where no loss counts.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class _Piece:
    """A stretch of a row's text; the loss counts on all of it or on none."""

    text: str
    is_target: bool


class RowEncoder:
    """Encodes raw rows. The columns of each row that are not None decide its shape, the first of these that fits:

    - `input_ids` and `labels`: used as they are.
    - `messages`, a list of `{"role": ..., "content": ...}`: rendered by the chat template, loss on every assistant turn
      (see `_encode_chat`). What follows the last assistant turn is left off. Needs a chat template.
    - `prompt` and `completion`, two strings or two lists of messages: loss on the completion (of messages: on its
      assistant turns).
    - `question` and `answer`: loss on the answer.
    - `instruction` and `output`, optionally `input`, which a blank line parts from the instruction: loss on the output.
    - `text`: as the tokenizer encodes it, then the end-of-sequence token; loss on every token.

    Strings become a user turn and an assistant turn of the chat template. For a tokenizer without one, they are
    the prompt with the special tokens that the tokenizer adds, the completion and the end-of-sequence token; a newline
    parts a question or an instruction from its answer, and nothing parts `prompt` from `completion`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = len(tokenizer)
        try:
            template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        except ValueError as error:  # Several templates, and none that is the default.
            raise LoptError(f"the tokenizer's chat template cannot be used: {first_line(error)}") from error
        self._has_template = template is not None
        # Only tokenizers of the `tokenizers` library can say which token a character of the text went to.
        self._has_generation_marks = bool(
            template and tokenizer.is_fast and re.search(r"\{%-?\s*generation\s*-?%\}", template)
        )

    def __call__(self, row: Mapping[str, Any]) -> EncodedRow:
        """Encodes one row; None values stand for absent columns. A row without anything to predict gets no targets.

        Raises:
            LoptError: the row has no usable columns, or a column does not hold what it should. The text does not say
                which row: the caller knows.
        """
        row = {column: value for column, value in row.items() if value is not None}
        if {"input_ids", "labels"} <= row.keys():
            return self._check_tokenized(row["input_ids"], row["labels"])
        if "messages" in row:
            messages = _check_messages(row, "messages")
            return self._encode_chat(messages, first_target=0, use_marks=True)
        if {"prompt", "completion"} <= row.keys():
            if isinstance(row["prompt"], str):
                return self._encode_pair(row["prompt"], _check_string(row, "completion"), separator="")
            context = _check_messages(row, "prompt")
            return self._encode_chat(context + _check_messages(row, "completion"), first_target=len(context))
        if {"question", "answer"} <= row.keys():
            return self._encode_pair(_check_string(row, "question"), _check_string(row, "answer"), separator="\n")
        if {"instruction", "output"} <= row.keys():
            prompt = _check_string(row, "instruction")
            if row.get("input"):
                prompt += "\n\n" + _check_string(row, "input")
            return self._encode_pair(prompt, _check_string(row, "output"), separator="\n")
        if "text" in row:
            return self._encode_text(_check_string(row, "text"))
        columns = ", ".join(row) if row else "none that is filled"
        raise LoptError(f"no usable columns (it has: {columns}); a row needs {'; or '.join(SHAPES)}")

    def _check_tokenized(self, input_ids: Any, labels: Any) -> EncodedRow:
        for column, ids in (("input_ids", input_ids), ("labels", labels)):
            if not isinstance(ids, list) or any(type(token) is not int for token in ids):
                raise LoptError(f"`{column}` must be a list of integers, but is {_shown(ids)}")
            for token in ids:
                if not 0 <= token < self._vocab_size and not (column == "labels" and token == IGNORE_INDEX):
                    also = " (or -100 where no loss counts)" if column == "labels" else ""
                    raise LoptError(
                        f"`{column}` holds {shown(token)}, but the tokenizer has the ids 0 to {self._vocab_size - 1}"
                        f"{also}; was it tokenized with another tokenizer?"
                    )
        if len(input_ids) != len(labels):
            raise LoptError(
                f"`input_ids` has {len(input_ids)} entries and `labels` {len(labels)}; give one label a token"
            )
        return EncodedRow(input_ids, labels)

    def _encode_pair(self, prompt: str, completion: str, separator: str) -> EncodedRow:
        if self._has_template:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return self._encode_chat(messages, first_target=1)
        pieces = [_Piece(prompt + separator, False), _Piece(completion, True)]
        row = self._encode_pieces(pieces, add_special_tokens=True)
        return self._end(row)

    def _encode_text(self, text: str) -> EncodedRow:
        if not text:  # nothing but special tokens would be left, and would teach to stop at once
            return EncodedRow([], [])
        return self._end(self._encode_pieces([_Piece(text, True)], add_special_tokens=True))

    def _end(self, row: EncodedRow) -> EncodedRow:
        """Puts the end-of-sequence token after the row, as a target, unless it is there."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise LoptError("the tokenizer has no end-of-sequence token to end the row with; set its `eos_token`")
        if row.input_ids[-1:] == [eos]:
            return row
        return EncodedRow([*row.input_ids, eos], [*row.labels, eos])

    def _encode_chat(self, messages: Messages, first_target: int, use_marks: bool = False) -> EncodedRow:
        """Encodes a conversation with the loss on the assistant turns from the message `first_target` on.

        Where the template marks what the assistant generates, those marks say which tokens count. Otherwise an answer
        is what the template adds to the conversation before it with the generation prompt; a template that renders
        that conversation differently once it is answered (some drop earlier reasoning) leaves the last answer only.
        An assistant turn that opens the conversation has no prompt, so it counts only where the template marks it.
        """
        if not self._has_template:
            raise LoptError(
                "it is a conversation, and the tokenizer has no chat template; give a tokenizer that has one"
            )
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [turn for turn in answers if turn >= first_target]
        messages = messages[: answers[-1] + 1] if answers else []
        if messages and use_marks and self._has_generation_marks:
            return self._encode_marked(messages)
        answers = [turn for turn in answers if turn > 0]
        if not answers:
            return EncodedRow([], [])
        pieces = self._cut_into_pieces(messages, answers) or self._cut_into_pieces(messages, answers[-1:])
        if pieces is None:
            raise LoptError(
                "the chat template renders the conversation before the last answer differently once the answer is "
                "there, so the answer's tokens cannot be told; mark them in the template with {% generation %}"
            )
        return self._encode_pieces(pieces, add_special_tokens=False)

    def _encode_marked(self, messages: Messages) -> EncodedRow:
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
            )
        except Exception as error:  # A template is a program, and may fail in any way at what it was not made for.
            raise _refused(error) from error
        assert isinstance(encoded, BatchEncoding)
        input_ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        labels = [token if is_target else IGNORE_INDEX for token, is_target in zip(input_ids, mask, strict=True)]
        return EncodedRow(input_ids, labels)

    def _cut_into_pieces(self, messages: Messages, answers: Sequence[int]) -> list[_Piece] | None:
        """Cuts the rendered conversation before and after each answer; None if the renderings do not nest."""
        text, pieces = "", []
        for turn in answers:
            for stop, is_target in ((turn, False), (turn + 1, True)):
                rendered = self._render(messages[:stop], add_generation_prompt=not is_target)
                if not rendered.startswith(text):
                    return None
                pieces.append(_Piece(rendered[len(text) :], is_target))
                text = rendered
        return pieces

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # A template is a program, and may fail in any way at what it was not made for.
            raise _refused(error) from error
        assert isinstance(rendered, str)
        return rendered

    def _encode_pieces(self, pieces: Sequence[_Piece], add_special_tokens: bool) -> EncodedRow:
        """Encodes the pieces so that no token reaches over a cut: generation, too, starts after a prompt's last token.

        A piece is encoded behind what stands before it where that leaves the tokens before it alone, since tokenizers
        that put a space before a text would put one before a piece encoded by itself.
        """
        try:
            "".join(piece.text for piece in pieces).encode()
        except UnicodeEncodeError as error:
            raise LoptError(f"its text is no Unicode: {first_line(error)}; change the row or leave it out") from error
        text = ""
        input_ids: list[int] = []
        labels: list[int] = []
        for piece in pieces:
            text += piece.text
            together = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
            if together[: len(input_ids)] == input_ids:
                tokens = together[len(input_ids) :]
            else:
                tokens = self._tokenizer.encode(piece.text, add_special_tokens=False, verbose=False)
            input_ids.extend(tokens)
            labels.extend(tokens if piece.is_target else [IGNORE_INDEX] * len(tokens))
        return EncodedRow(input_ids, labels)


def _check_string(row: Mapping[str, Any], column: str) -> str:
    if not isinstance(row[column], str):
        raise LoptError(f"`{column}` must be a string, but is {_shown(row[column])}")
    return row[column]


def _check_messages(row: Mapping[str, Any], column: str) -> Messages:
    messages = row[column]
    if not isinstance(messages, list):
        expected = "a list of messages" + (", as `prompt` is" if column == "completion" else "")
        raise LoptError(f"`{column}` must be {expected}, but is {_shown(messages)}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise LoptError(
                f"message {number} of `{column}` must have the strings `role` and `content`, but is {_shown(message)}"
            )
    return messages


def _refused(error: Exception) -> LoptError:
    return LoptError(f"the chat template refuses the conversation: {first_line(error)}; change the row or leave it out")


def _shown(value: Any) -> str:
    return f"{shown(value)} ({type(value).__name__})"

"""Turns one raw row of a data set into token ids and labels."""

import dataclasses

from transformers import PreTrainedTokenizerBase

from lopt_pp.config.truncation import Truncation
from lopt_pp.data.chats import EMPTY, ChatEncoder
from lopt_pp.data.cutting import Cutter
from lopt_pp.data.encoded import EncodedRow, Note, make_labels
from lopt_pp.data.formats import IGNORE_INDEX, Conversation, Pair, Reader, Row, Text, Tokens, read_row
from lopt_pp.errors import LoptError, shown

__all__ = ["IGNORE_INDEX", "EncodedRow", "Note", "RowEncoder"]


_NO_TURNS = "it is {}, which has no turns of an assistant, and --assistant_only_loss is given; leave that out"


class RowEncoder:
    """Encodes raw rows, of any shape that `read_row` knows.

    - Conversations are rendered by the chat template, with the loss on every assistant turn (see `ChatEncoder`); of
      `prompt` and `completion`, on those of the completion. What follows the last answer is left off.
    - A prompt and its answer become a user turn and an assistant turn of the chat template, with the loss on the
      answer. For a tokenizer without a template they are the prompt with the special tokens that the tokenizer puts
      before a text, the answer and the end-of-sequence token; a newline parts a question or an instruction from its
      answer, and nothing parts `prompt` from `completion`. So are those whose prompt the template has made already.
    - A text is as the tokenizer encodes it, then the end-of-sequence token, with the loss on every token.
    - Tokens are used as they are.

    What counts holds the answer and ends in a token that ends the turn; a row of which that is not true is `unusable`.

    Args:
        tokenizer: of the model.
        read: tells a row's shape.
        assistant_only_loss: whether the loss of a conversation counts on assistant turns only. None: so it is; but
            where `completion_only_loss` is given and the conversation is a prompt with its completion, that alone says
            what counts, as in TRL.
        completion_only_loss: whether the loss counts on the answer only, where there is a prompt and an answer. None:
            so it is.
        allow_no_stop_token: whether an answer may end without a token that ends the turn.
        truncation: what rows are cut to once they are known to be usable; None where they are not.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        read: Reader = read_row,
        assistant_only_loss: bool | None = None,
        completion_only_loss: bool | None = None,
        allow_no_stop_token: bool = False,
        truncation: Truncation | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._read = read
        self._truncation = truncation
        self._asks_for_assistant = bool(assistant_only_loss)
        self._assistant_only = assistant_only_loss is not False
        self._completion_only = completion_only_loss is not False
        # Of a prompt with its completion.
        self._assistant_only_there = self._assistant_only and (assistant_only_loss or completion_only_loss is None)
        self._vocab_size = len(tokenizer)
        self._cutter = Cutter(tokenizer)
        has_template = bool(tokenizer.chat_template)
        self._chats = ChatEncoder(tokenizer, self._cutter, allow_no_stop_token) if has_template else None

    def __call__(self, row: Row) -> EncodedRow | None:
        """Encodes one row; None values are absent columns. A row without anything to predict gets no targets.

        Returns:
            The row; None where `--dataset_mapping` leaves it out.

        Raises:
            LoptError: the row cannot be used. The text does not say which it is: the caller knows.
        """
        shape = self._read(row)
        if shape is None:
            return None
        match shape:
            case Tokens():
                result = self._check_tokens(shape.input_ids, self._labels(shape))
            case Conversation():
                result = self._encode_chat(shape)
            case Pair():
                result = self._encode_pair(shape)
            case Text() if self._asks_for_assistant:
                raise LoptError(_NO_TURNS.format("a text"))
            case Text(text):
                # Nothing but special tokens would be left of an empty one, and would teach to stop at once.
                result = self._encode_plain("", text, prompt_counts=True) if text else EncodedRow([], [])
        return dataclasses.replace(result, unused=(*shape.unused, *result.unused)).truncated(self._truncation)

    def _labels(self, tokens: Tokens) -> list[int]:
        if self._asks_for_assistant and not tokens.is_masked:
            raise LoptError(_NO_TURNS.format("tokens without `assistant_masks`"))
        return tokens.labels if self._completion_only or tokens.with_prompt is None else tokens.with_prompt

    def _check_tokens(self, input_ids: list[int], labels: list[int]) -> EncodedRow:
        for column, ids in (("input_ids", input_ids), ("labels", labels)):
            for token in ids:
                if not 0 <= token < self._vocab_size and not (column == "labels" and token == IGNORE_INDEX):
                    also = " (or -100 where no loss counts)" if column == "labels" else ""
                    raise LoptError(
                        f"`{column}` holds {shown(token)}, but the tokenizer has the ids 0 to {self._vocab_size - 1}"
                        f"{also}; was it tokenized with another tokenizer?"
                    )
        return EncodedRow(input_ids, labels)

    def _encode_chat(self, chat: Conversation) -> EncodedRow:
        if self._chats is None:
            raise LoptError(
                "it is a conversation, and the tokenizer has no chat template; give one by --chat_template_path"
            )
        assistant_only = self._assistant_only_there if chat.prompt_length else self._assistant_only
        result = self._chats.encode(chat, assistant_only, self._completion_only, self._asks_for_assistant)
        return dataclasses.replace(result, unused=tuple(self._chats.unread(chat)))

    def _encode_pair(self, pair: Pair) -> EncodedRow:
        if not pair.completion.strip():
            return EncodedRow([], [], unusable=EMPTY)
        if self._chats is None:
            if "tools" in pair.options:
                raise LoptError(
                    "it has `tools`, and the tokenizer has no chat template; give one by --chat_template_path"
                )
            return self._encode_plain(pair.plain, pair.completion, prompt_counts=not self._completion_only)
        if self._chats.has_made(pair.prompt):
            result = self._encode_plain(pair.prompt, pair.completion, prompt_counts=not self._completion_only)
            return dataclasses.replace(result, notes=Note.RENDERED, unused=tuple(pair.options))
        turns = [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.completion}]
        chat = Conversation(turns, prompt_length=1, options=pair.options)
        result = self._chats.encode(chat, self._completion_only, self._completion_only)
        return dataclasses.replace(result, unused=tuple(self._chats.unread(chat))) if pair.options else result

    def _encode_plain(self, prompt: str, text: str, prompt_counts: bool) -> EncodedRow:
        """Encodes what no template has made: once the special tokens that begin a text, and that which ends it."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise LoptError("the tokenizer has no end-of-sequence token to end the row with; set its `eos_token`")
        input_ids, [(start, stop)] = self._cutter.at_cuts(prompt + text, [(len(prompt), len(prompt + text))])
        opening = self._cutter.opening
        if input_ids[: len(opening)] != opening:
            input_ids, start = [*opening, *input_ids], start + len(opening)
        if self._cutter.last_token(input_ids) != eos:
            input_ids = [*input_ids, eos]
        return EncodedRow(input_ids, make_labels(input_ids, [(0 if prompt_counts else start, len(input_ids))]))

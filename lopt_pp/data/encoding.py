"""Turns one raw row of a data set into token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from lopt_pp.data.formats import IGNORE_INDEX, Conversation, Messages, Pair, Reader, Row, Text, Tokens, read_row
from lopt_pp.errors import LoptError, first_line, shown

__all__ = ["IGNORE_INDEX", "EncodedRow", "Note", "RowEncoder"]


class Note(IntFlag):
    """What an encoding has changed of a row, for counting."""

    TAIL_CUT = 1
    """The messages after the last answer are left off: nothing in them is learned."""
    ONLY_LAST_ANSWER = 2
    """Earlier answers do not count: the chat template renders them otherwise once the conversation goes on."""


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model sees it.

    Attributes:
        input_ids: the token ids.
        labels: as long and aligned with `input_ids` (the loss shifts them), -100 where no loss counts.
        notes: what was changed on the way.
    """

    input_ids: list[int]
    labels: list[int]
    notes: Note = Note(0)

    @property
    def num_targets(self) -> int:
        """The number of predicted tokens with a loss: of labels other than -100, after the first."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class _Piece:
    """A stretch of a row's text; the loss counts on all of it or on none."""

    text: str
    is_target: bool


class RowEncoder:
    """Encodes raw rows, of any shape that `read_row` knows.

    - Conversations are rendered by the chat template, with the loss on every assistant turn (see `_encode_chat`); of
      `prompt` and `completion`, on those of the completion. What follows the last answer is left off.
    - A prompt and its answer become a user turn and an assistant turn of the chat template, with the loss on the
      answer. For a tokenizer without a template they are the prompt with the special tokens that the tokenizer adds,
      the answer and the end-of-sequence token; a newline parts a question or an instruction from its answer, and
      nothing parts `prompt` from `completion`.
    - A text is as the tokenizer encodes it, then the end-of-sequence token, with the loss on every token.
    - Tokens are used as they are.

    Args:
        tokenizer: of the model.
        read: tells a row's shape.
        assistant_only_loss: whether the loss of a conversation counts on assistant turns only.
        completion_only_loss: whether the loss counts on the answer only, where there is a prompt and an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        read: Reader = read_row,
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._read = read
        self._assistant_only, self._completion_only = assistant_only_loss, completion_only_loss
        self._vocab_size = len(tokenizer)
        self._has_template = bool(tokenizer.chat_template)
        try:
            template = tokenizer.get_chat_template() if self._has_template else ""
        except ValueError as error:  # Several templates, and none that is the default.
            raise LoptError(f"the tokenizer's chat template cannot be used: {first_line(error)}") from error
        # Only tokenizers of the `tokenizers` library can say which token a character of the text went to.
        can_tell = self._has_template and tokenizer.is_fast
        marked = can_tell and has_generation_markers(template)
        self._marked_template = template if marked else None
        self._trl_template = _trl_template(tokenizer) if can_tell and not marked else None

    def __call__(self, row: Row) -> EncodedRow | None:
        """Encodes one row; None values are absent columns. A row without anything to predict gets no targets.

        Returns:
            The row; None where `--dataset_mapping` leaves it out.

        Raises:
            LoptError: the row cannot be used. The text does not say which it is: the caller knows.
        """
        match self._read(row):
            case Tokens(input_ids, labels):
                return self._check_tokens(input_ids, labels)
            case Conversation() as conversation:
                return self._encode_chat(conversation)
            case Pair(prompt, completion, _) if self._has_template:
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                chat = Conversation(messages, prompt_length=1)
                return self._encode_chat(chat) if self._completion_only else self._encode_whole(chat)
            case Pair(_, completion, plain):
                pieces = [_Piece(plain, not self._completion_only), _Piece(completion, True)]
                return self._end(self._encode_pieces(pieces, add_special_tokens=True))
            case Text(text):
                if not text:  # Nothing but special tokens would be left, and would teach to stop at once.
                    return EncodedRow([], [])
                return self._end(self._encode_pieces([_Piece(text, True)], add_special_tokens=True))
            case _:
                return None

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

    def _end(self, row: EncodedRow) -> EncodedRow:
        """Puts the end-of-sequence token after the row, as a target, unless it is there."""
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise LoptError("the tokenizer has no end-of-sequence token to end the row with; set its `eos_token`")
        if row.input_ids[-1:] == [eos]:
            return row
        return EncodedRow([*row.input_ids, eos], [*row.labels, eos])

    def _encode_chat(self, chat: Conversation) -> EncodedRow:
        """Encodes a conversation with the loss on the assistant turns: of a completion, on those after its prompt.

        Where the template marks what the assistant generates, the marks say which tokens count. Otherwise an answer is
        what the template adds to the conversation before it with the generation prompt. Some templates render that
        conversation differently once it is answered (they drop earlier reasoning): then TRL's copy of the template,
        which has marks, is taken if TRL knows the template, and else the last answer alone counts. An assistant turn
        that opens the conversation has no prompt, so it counts only where the template marks it.
        """
        if not self._has_template:
            raise LoptError(
                "it is a conversation, and the tokenizer has no chat template; give one by --chat_template_path"
            )
        messages, first_target = chat.messages, chat.prompt_length if self._completion_only else 0
        if not self._assistant_only and not first_target:
            return self._encode_whole(chat)
        if not self._assistant_only:
            targets = [(first_target, len(messages))] if first_target < len(messages) else []
            return self._encode_targets(chat, targets, Note(0))
        answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [turn for turn in answers if turn >= first_target]
        notes = Note.TAIL_CUT if answers and answers[-1] + 1 < len(messages) else Note(0)
        kept = Conversation(messages[: answers[-1] + 1] if answers else [], chat.prompt_length, chat.options)
        if kept.messages and not chat.prompt_length and self._marked_template:
            return self._encode_marked(kept, self._marked_template, notes)
        targets = [(turn, turn + 1) for turn in answers if turn > 0]
        return self._encode_targets(kept, targets, notes, None if chat.prompt_length else self._trl_template)

    def _encode_whole(self, chat: Conversation) -> EncodedRow:
        if not chat.messages:
            return EncodedRow([], [])
        whole = self._render(chat.messages, chat, add_generation_prompt=False)
        return self._encode_pieces([_Piece(whole, True)], add_special_tokens=False)

    def _encode_marked(self, chat: Conversation, template: str, notes: Note) -> EncodedRow:
        options = {"chat_template": template} | chat.options
        try:
            encoded = self._tokenizer.apply_chat_template(
                chat.messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
                **options,
            )
        except Exception as error:  # A template is a program, and may fail in any way at what it was not made for.
            raise _refused(error) from error
        assert isinstance(encoded, BatchEncoding)
        input_ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        labels = [token if is_target else IGNORE_INDEX for token, is_target in zip(input_ids, mask, strict=True)]
        return EncodedRow(input_ids, labels, notes)

    def _encode_targets(
        self, chat: Conversation, targets: Sequence[tuple[int, int]], notes: Note, marked_template: str | None = None
    ) -> EncodedRow:
        """Encodes a conversation with the loss on some runs of its messages.

        Args:
            chat: the conversation.
            targets: the runs, each from its first message to before its last.
            notes: what was changed of it.
            marked_template: that marks the runs, where their tokens cannot be told by the tokenizer's template.
        """
        if not targets:
            return EncodedRow([], [])
        pieces = self._cut_into_pieces(chat, targets)
        if pieces is None and marked_template is not None:
            return self._encode_marked(chat, marked_template, notes)
        if pieces is None and (pieces := self._cut_into_pieces(chat, targets[-1:])) is not None:
            notes |= Note.ONLY_LAST_ANSWER
        if pieces is None:
            raise LoptError(
                "the chat template renders the conversation before the last answer differently once the answer is "
                "there, so the answer's tokens cannot be told; mark them in the template with {% generation %}"
            )
        row = self._encode_pieces(pieces, add_special_tokens=False)
        return EncodedRow(row.input_ids, row.labels, notes)

    def _cut_into_pieces(self, chat: Conversation, targets: Sequence[tuple[int, int]]) -> list[_Piece] | None:
        """Cuts the rendered conversation before and after each target; None if the renderings do not nest."""
        text, pieces = "", []
        for start, stop in targets:
            for end, is_target in ((start, False), (stop, True)):
                prompts = not is_target and chat.messages[start]["role"] == "assistant"
                rendered = self._render(chat.messages[:end], chat, add_generation_prompt=prompts)
                if not rendered.startswith(text):
                    return None
                pieces.append(_Piece(rendered[len(text) :], is_target))
                text = rendered
        return pieces

    def _render(self, messages: Messages, chat: Conversation, add_generation_prompt: bool) -> str:
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        try:
            rendered = self._tokenizer.apply_chat_template(messages, **options, **chat.options)
        except Exception as error:  # A template is a program, and may fail in any way at what it was not made for.
            raise _refused(error) from error
        assert isinstance(rendered, str)
        return rendered

    def _encode_pieces(self, pieces: Sequence[_Piece], add_special_tokens: bool) -> EncodedRow:
        """Encodes the pieces so that no token reaches over a cut: generation, too, starts after a prompt's last token.

        A piece is encoded behind what comes before it where that leaves the tokens before it alone, since tokenizers
        that put a space before a text would put one before a piece encoded by itself.
        """
        try:
            "".join(piece.text for piece in pieces).encode()
        except UnicodeEncodeError as error:
            raise LoptError(f"its text is not Unicode: {first_line(error)}; change the row or leave it out") from error
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


def _trl_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """TRL's copy of the tokenizer's chat template, with marks on what the assistant generates, if there is one."""
    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # Not one that TRL knows; or a program that fails in its own way at TRL's questions.
        return None


def _refused(error: Exception) -> LoptError:
    return LoptError(f"the chat template refuses the conversation: {first_line(error)}; change the row or leave it out")

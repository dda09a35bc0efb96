"""Turns conversations into token ids and labels, by the chat template of the tokenizer."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lopt_pp.data.answers import Answer, Rendered, Run, by_marks, by_prefixes, is_empty, keeps_context, lost
from lopt_pp.data.chat_template import ChatTemplate, trl_template
from lopt_pp.data.cutting import Cutter, Span
from lopt_pp.data.encoded import EncodedRow, Note, make_labels
from lopt_pp.data.formats import Conversation
from lopt_pp.data.messages import STANDARD_KEYS, Messages
from lopt_pp.errors import LoptError

EMPTY = "with an empty answer"
_NO_STOP = "whose answer does not end in a stop token"

_CALL = {"id": "probed000", "type": "function", "function": {"name": "probed", "arguments": {"key": "value"}}}
_ASKED: Messages = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "answer"}]
_ASKED_OF_A_TOOL: Messages = [
    {"role": "user", "content": "probe"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "result", "name": "probed", "tool_call_id": "probed000"},
    {"role": "assistant", "content": "answer"},
]


@dataclass(frozen=True)
class _Way:
    """A way to find the answers of a conversation.

    Attributes:
        template: that renders it.
        by_marks: whether the template's marks say where they are.
        marks_are_own: whether these are the tokenizer's own, which are taken as they are, to the token.
        stops: the tokens that end a turn; None where they are not known, so that any added token does.
        can_stop: whether a turn ends with one of them.
    """

    template: ChatTemplate
    by_marks: bool
    marks_are_own: bool = False
    stops: frozenset[int] | None = None
    can_stop: bool = True


class ChatEncoder:
    """Encodes conversations, with the loss on the assistant's turns.

    There are two ways to tell which tokens these are. The template may mark what the assistant generates; where it does
    not, TRL may have a copy of it that does. Otherwise an answer is what the template adds to the conversation before
    it with the generation prompt. Some templates render that conversation differently once it is answered (they drop
    earlier reasoning): then the last answer alone counts. An assistant turn that opens the conversation has no prompt,
    so it counts only where it is marked.

    Of these, the first is taken of which the answers are whole and end in a token that ends a turn.

    Args:
        tokenizer: of the model, with a chat template.
        cutter: of the tokenizer.
        allow_no_stop_token: whether an answer may end without a token that ends the turn.

    Raises:
        LoptError: the tokenizer has several templates, and none that is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cutter: Cutter, allow_no_stop_token: bool) -> None:
        self._tokenizer = tokenizer
        self._cutter = cutter
        self._allow_no_stop = allow_no_stop_token
        own = ChatTemplate(tokenizer)
        self._ways = self._ways_of(own, None if own.has_marks else trl_template(tokenizer))
        stops = {token for way in self._ways for token in way.stops or ()}
        self._endings = tuple(map(str, tokenizer.convert_ids_to_tokens(sorted(stops))))

    def encode(
        self, chat: Conversation, assistant_only: bool, completion_only: bool, marks_decide: bool = False
    ) -> EncodedRow:
        """Encodes a conversation. What of it counts:

        Args:
            chat: the conversation.
            assistant_only: the assistant's turns only.
            completion_only: of one with a prompt, what is behind the prompt only.
            marks_decide: whether the template's marks decide there, too, and not what it adds to the prompt.

        Raises:
            LoptError: no template takes the conversation, the answers cannot be told, or no answer could stop.
        """
        first = chat.prompt_length if completion_only else 0
        turns, notes = chat.messages, Note(0)
        if assistant_only:
            answers = [n for n in range(first, len(turns)) if turns[n]["role"] == "assistant" and n not in chat.skipped]
            runs = [(turn, turn + 1) for turn in answers]
            if answers and answers[-1] + 1 < len(turns):
                notes, turns = Note.TAIL_CUT, turns[: answers[-1] + 1]
        else:
            runs = _without(first, len(turns), chat.skipped)
        turns = [self._without_ending(message) for message in turns]
        counted = [turns[turn] for run in runs for turn in range(*run)]
        if any(message["role"] == "assistant" and is_empty(message) for message in counted):
            return EncodedRow([], [], unusable=EMPTY)
        chat = dataclasses.replace(chat, messages=turns, prompt_length=first)
        ways = self._ways
        if source := chat.options.get("chat_template"):
            chat = dataclasses.replace(chat, options={k: v for k, v in chat.options.items() if k != "chat_template"})
            ways = self._ways_of(ChatTemplate(self._tokenizer, source), None)
        marks_first = assistant_only and (marks_decide or not first)
        row = self._encode_best(self._order(ways, marks_first), chat, runs, assistant_only)
        return dataclasses.replace(row, notes=row.notes | notes if row.input_ids else row.notes)

    def _without_ending(self, message: dict[str, Any]) -> dict[str, Any]:
        """An answer without the stop token that the row itself has put behind it: the template puts one there."""
        content = message["content"]
        if message["role"] != "assistant" or not isinstance(content, str):
            return message
        for ending in self._endings:
            if content.rstrip().endswith(ending):
                return message | {"content": content.rstrip().removesuffix(ending)}
        return message

    def has_made(self, prompt: str) -> bool:
        """Whether a prompt is one that the chat template has made already."""
        return any(way.template.has_made(prompt) for way in self._ways)

    def unread(self, chat: Conversation) -> list[str]:
        """What no template reads of a conversation: its tools and options, and keys of messages as `messages.KEY`."""
        keys = dict.fromkeys(key for message in chat.messages for key in message if key not in STANDARD_KEYS)
        templates = [way.template for way in self._ways]
        unread = [f"messages.{key}" for key in keys if not any(template.reads(key) for template in templates)]
        options = [key for key in chat.options if not any(template.mentions(key) for template in templates)]
        return unread + [
            key if key == "tools" else f"chat_template_kwargs.{key}" for key in options if key != "chat_template"
        ]

    def _encode_best(
        self, ways: Sequence[_Way], chat: Conversation, runs: Sequence[Run], assistant_only: bool
    ) -> EncodedRow:
        """Encodes in the first way in which the row can be used, or else in the first in which it can be rendered."""
        unusable: EncodedRow | None = None
        refused: LoptError | None = None
        endless: LoptError | None = None
        for way in ways:
            told = runs if not assistant_only or way.by_marks else [run for run in runs if run[0] > 0]
            if not told:
                unusable = unusable or EncodedRow([], [])
                continue
            if not way.can_stop and not self._allow_no_stop:
                endless = LoptError(
                    "the chat template ends no answer with a token that the model could learn to stop with; give one "
                    "that does by --chat_template_path, or --allow_no_stop_token true"
                )
                continue
            try:
                row = self._encode_in(way, chat, told)
            except LoptError as error:
                refused = refused or error
                continue
            if not row.unusable:
                return row
            unusable = unusable or row
        if unusable is None:
            cause = endless or refused
            assert cause is not None
            raise cause
        return unusable

    def _order(self, ways: Sequence[_Way], marks_first: bool) -> list[_Way]:
        """The best way first: marks, or for the answer to a prompt what is added to it; and those that can stop."""
        if marks_first:  # The tokenizer's own marks decide.
            ways = [way for way in ways if way.marks_are_own] or ways
        return sorted(ways, key=lambda way: (not way.can_stop, way.by_marks != marks_first))

    def _encode_in(self, way: _Way, chat: Conversation, runs: Sequence[Run]) -> EncodedRow:
        """Encodes a conversation in one way.

        Raises:
            LoptError: the template refuses it, or the answers' tokens cannot be told.
        """
        notes, uncounted = Note(0), list[Answer]()
        rendered = self._find(way, chat, runs)
        if rendered is None and len(runs) > 1:
            rendered, notes = self._find(way, chat, runs[-1:]), Note.ONLY_LAST_ANSWER
            uncounted = [Answer(run, []) for run in runs[:-1]]
        if rendered is None:
            raise LoptError(
                "the chat template renders the conversation before the last answer differently once the answer is "
                "there, so the answer's tokens cannot be told; mark them in the template with {% generation %}"
            )
        kept, start = [], 0
        for answer in (*uncounted, *rendered.answers):
            what = self._lost(chat, rendered, answer, start)
            if what == "reasoning" and answer is not rendered.answers[-1]:
                notes |= Note.NO_REASONING if answer.spans else Note(0)
            elif what:
                return EncodedRow([], [], unusable=f"whose {what} the chat template leaves out")
            elif answer.spans:
                kept.append(answer)
            start = answer.spans[-1][1] if answer.spans else start
        if not keeps_context(chat.messages, rendered.text):
            notes |= Note.CONTEXT_LOST
        input_ids, spans = self._tokens(way, rendered.text, kept)
        for answer, stretches in zip(kept, spans, strict=True):
            ends = chat.messages[answer.run[1] - 1]["role"] == "assistant"
            if ends and not self._allow_no_stop:
                counted = [token for start, stop in stretches for token in input_ids[start:stop]]
                if not self._is_stop(self._cutter.last_token(counted), way.stops):
                    return EncodedRow([], [], unusable=_NO_STOP)
        return EncodedRow(input_ids, make_labels(input_ids, [span for answer in spans for span in answer]), notes)

    def _find(self, way: _Way, chat: Conversation, runs: Sequence[Run]) -> Rendered | None:
        fitted = dataclasses.replace(chat, messages=way.template.fit(chat.messages))
        singly = all(stop - start == 1 for start, stop in runs)
        return (by_marks if way.by_marks and singly else by_prefixes)(way.template, fitted, runs)

    def _lost(self, chat: Conversation, rendered: Rendered, answer: Answer, start: int) -> str:
        """What the template has left out of an answer, whose text begins after `start`."""
        counted = "".join(rendered.text[start:stop] for start, stop in answer.spans) or rendered.text
        near = rendered.text[start : answer.spans[-1][1]] if answer.spans else rendered.text
        for turn in range(*answer.run):
            if chat.messages[turn]["role"] == "assistant" and turn not in chat.skipped:
                what = lost(chat.messages[turn], counted, near)
                # Of a whole conversation, earlier turns are the context that the model is given later.
                if what and not (what == "reasoning" and turn + 1 < answer.run[1]):
                    return what
        return ""

    def _tokens(self, way: _Way, text: str, answers: Sequence[Answer]) -> tuple[list[int], list[list[Span]]]:
        """The tokens of a text, and the spans of them that belong to each answer."""
        spans = [span for answer in answers for span in answer.spans]
        encode = self._cutter.touching if way.by_marks and way.marks_are_own else self._cutter.at_cuts
        input_ids, counted = encode(text, spans)
        following = iter(counted)
        return input_ids, [[next(following) for _ in answer.spans] for answer in answers]

    def _ways_of(self, own: ChatTemplate, marked: ChatTemplate | None) -> list[_Way]:
        """The ways to find the answers of a conversation."""
        ways = [_Way(own, by_marks=False)]
        if own.has_marks:
            ways.append(_Way(own, by_marks=True, marks_are_own=True))
        elif marked is not None:
            ways.append(_Way(marked, by_marks=True))
        return [self._with_stops(way) for way in ways]

    def _with_stops(self, way: _Way) -> _Way:
        """Finds which tokens end a turn, by conversations that show it."""
        stops: set[int | None] = set()
        plain: list[bool] = []
        for probe in (_ASKED, _ASKED * 2, _ASKED_OF_A_TOOL):
            runs = [(turn, turn + 1) for turn, message in enumerate(probe) if message["role"] == "assistant"]
            try:
                rendered = self._find(way, Conversation(probe), runs)
            except LoptError:
                continue
            if rendered is None:
                continue
            input_ids, spans = self._tokens(way, rendered.text, rendered.answers)
            for stretches in spans:
                last = self._cutter.last_token([token for start, stop in stretches for token in input_ids[start:stop]])
                if is_stop := self._is_stop(last, None):
                    stops.add(last)
                if probe is not _ASKED_OF_A_TOOL:
                    plain.append(is_stop)
        if not plain:
            return way
        ends = frozenset(token for token in stops if token is not None)
        return dataclasses.replace(way, stops=ends, can_stop=any(plain))

    def _is_stop(self, token: int | None, stops: frozenset[int] | None) -> bool:
        if token is None:
            return False
        is_end = self._cutter.is_added(token) if stops is None else token in stops
        return is_end or token == self._tokenizer.eos_token_id


def _without(first: int, last: int, skipped: frozenset[int]) -> list[Run]:
    """The runs of all messages from the first to before the last but those that are skipped."""
    runs, start = [], first
    for turn in (*sorted(turn for turn in skipped if turn >= first), last):
        if start < turn:
            runs.append((start, turn))
        start = turn + 1
    return runs

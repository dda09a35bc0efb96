"""Where the answers of a conversation are in the text that a chat template makes of it, and whether they are whole."""

import bisect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lopt_pp.data.chat_template import ChatTemplate, common_length
from lopt_pp.data.cutting import Span
from lopt_pp.data.formats import Conversation
from lopt_pp.data.messages import REASONING_KEYS, Messages
from lopt_pp.errors import LoptError

Run = tuple[int, int]
"""Messages that count together, from the first to before the last."""

_MANY = 8
"""More runs than this are found among their neighbours: rendering all before each takes time with their square."""

_OPENING = re.compile(r"\s*(?:<(?:\w+:)?think(?:ing)?>|\[THINK\])")
_CLOSING = re.compile(r"</(?:\w+:)?think(?:ing)?>|\[/THINK\]")
_PLAIN = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Answer:
    """What counts of a run of messages.

    Attributes:
        run: the messages.
        spans: of the text; none where the template's marks leave the run out.
    """

    run: Run
    spans: list[Span]


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation, and the answers in it, in order."""

    text: str
    answers: list[Answer]


def by_marks(template: ChatTemplate, chat: Conversation, runs: Sequence[Run]) -> Rendered:
    """The answers as a template marks them, that marks what the assistant generates.

    Args:
        template: that has marks.
        chat: the conversation, as `template.fit` makes it.
        runs: each of one message of the assistant.

    Raises:
        LoptError: the template refuses the conversation.
    """
    text, spans = template.render_marked(chat.messages, chat.options)
    if chat.prompt_length:
        prompt = template.render(chat.messages[: chat.prompt_length], chat.options, add_generation_prompt=True)
        start = common_length(prompt, text)
        spans = [(max(start, span[0]), span[1]) for span in spans if span[1] > start]
    turns = [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]
    turns = [turn for turn in turns if turn >= chat.prompt_length]
    owners: Sequence[int] = turns
    if len(turns) != len(spans):  # A turn has several marked spans, or none.
        begins = [_begin_of(template, chat, turn, text) for turn in turns]
        owners = [max((turns[n] for n, begin in enumerate(begins) if begin <= start), default=-1) for start, _ in spans]
    of_turn: dict[int, list[Span]] = {turn: [] for turn in turns}
    for owner, span in zip(owners, spans, strict=True):
        of_turn.setdefault(owner, []).extend(_split(template.generation_prompt, text, span))
    return Rendered(text, [Answer(run, of_turn.get(run[0], [])) for run in runs])


def _split(generation_prompt: str, text: str, span: Span) -> list[Span]:
    """A marked span, in two where it begins before the generation prompt ends: no token may reach over that end."""
    start, stop = span
    for inside in range(1, len(generation_prompt)):
        outside = len(generation_prompt) - inside
        if text.startswith(generation_prompt[outside:], start) and text.endswith(generation_prompt[:outside], 0, start):
            return [(start, start + inside), (start + inside, stop)] if start + inside < stop else [span]
    return [span]


def _begin_of(template: ChatTemplate, chat: Conversation, turn: int, text: str) -> int:
    return common_length(template.render(chat.messages[:turn], chat.options), text) if turn else 0


def by_prefixes(template: ChatTemplate, chat: Conversation, runs: Sequence[Run]) -> Rendered | None:
    """The answers as what a template adds for them to the conversation before them, with the generation prompt.

    Args:
        template: any.
        chat: the conversation, as `template.fit` makes it, up to the last run.
        runs: of messages that count.

    Returns:
        None if the template renders what is before a run differently once the run is there.

    Raises:
        LoptError: the template refuses the conversation.
    """
    found = _among_neighbours(template, chat, runs) if len(runs) > _MANY else None
    if found is not None:
        return found
    text, answers = "", []
    for run in runs:
        before, after = _around(template, chat.messages, chat.options, run)
        if not before.startswith(text) or not after.startswith(before):
            return None
        answers.append(Answer(run, [(len(before), len(after))]))
        text = after
    return Rendered(text, answers)


def _around(template: ChatTemplate, messages: Messages, options: Mapping[str, Any], run: Run) -> tuple[str, str]:
    """The text before a run, and the text to its end."""
    start, stop = run
    prompts = start < stop and messages[start]["role"] == "assistant"
    before = template.render(messages[:start], options, add_generation_prompt=prompts) if start else ""
    return before, template.render(messages[:stop], options)


def _among_neighbours(template: ChatTemplate, chat: Conversation, runs: Sequence[Run]) -> Rendered | None:
    """What `by_prefixes` does, in time that is linear in the conversation; None where it does not come out even.

    What a template adds for a run is rendered with the messages around it alone: those of the system, the user's last
    before the previous run, and all from the previous run on. What is found so must make up the text of the whole
    conversation, piece by piece.
    """
    messages, options = chat.messages, chat.options
    leading = next((turn for turn, message in enumerate(messages) if message["role"] != "system"), 0)
    users = [turn for turn, message in enumerate(messages) if message["role"] == "user" and turn >= leading]
    try:
        before, after = _around(template, messages, options, runs[0])
        if not after.startswith(before):
            return None
        pieces, answers, length = [after], [Answer(runs[0], [(len(before), len(after))])], len(after)
        for previous, run in zip(runs, runs[1:], strict=False):
            user = users[place - 1 : place] if (place := bisect.bisect_left(users, previous[0])) else []
            lead = [*messages[:leading], *(messages[turn] for turn in user)]
            near = lead + messages[previous[0] : run[1]]
            shift = previous[0] - len(lead)
            known = template.render(near[: previous[1] - shift], options)
            before, after = _around(template, near, options, (run[0] - shift, run[1] - shift))
            if not before.startswith(known) or not after.startswith(before):
                return None
            start, stop = length + len(before) - len(known), length + len(after) - len(known)
            pieces.append(after[len(known) :])
            answers.append(Answer(run, [(start, stop)]))
            length = stop
        text = template.render(messages[: runs[-1][1]], options)
    except LoptError:  # What is refused of a part may be taken as a whole.
        return None
    return Rendered(text, answers) if text == "".join(pieces) else None


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether an answer says nothing, beside its reasoning."""
    return not _said(message)[1] and not message.get("tool_calls")


def lost(message: Mapping[str, Any], counted: str, text: str) -> str:
    """What of an answer a template has left out: its `answer`, `tool call` or `reasoning`; "" where nothing is.

    Args:
        message: of the assistant.
        counted: what counts of it.
        text: of the conversation up to the answer's end, in which the reasoning may be without counting.
    """
    thoughts, answer = _said(message)
    if answer not in counted:
        return "answer"
    if not all(name in counted for call in message.get("tool_calls") or () for name in _names(call)):
        return "tool call"
    return "" if all(thought in text for thought in thoughts) else "reasoning"


def keeps_context(messages: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether all that others than the assistant say is in the text of a conversation, as it is or as JSON."""
    place = 0
    for message in messages:
        content = message.get("content")
        if message["role"] == "assistant" or not isinstance(content, str) or not (said := content.strip()):
            continue
        # Most are in order. A template may put the system message elsewhere, and others into JSON.
        found = text.find(said, place)
        if found >= 0:
            place = found + len(said)
        elif said not in text and not any(json.dumps(said, ensure_ascii=a)[1:-1] in text for a in (False, True)):
            return False
    return True


def _said(message: Mapping[str, Any]) -> tuple[list[str], str]:
    """The reasoning of a message and the answer behind it."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part["text"] for part in content)
    thoughts = [message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)]
    if closing := _CLOSING.search(content):
        opening = _OPENING.match(content)
        # Where a tag opens elsewhere, the answer speaks of tags. None opens where the generation prompt has done so.
        if opening or not _OPENING.search(content, 0, closing.start()):
            thoughts.append(content[opening.end() if opening else 0 : closing.start()])
            content = content[closing.end() :]
    return [thought.strip() for thought in thoughts], content.strip()


def _names(call: Any) -> list[str]:
    """The name of the function that is called, and those of the arguments."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return []
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    keys = [key for key in arguments if _PLAIN.fullmatch(key)] if isinstance(arguments, dict) else []
    return [str(function.get("name", "")), *keys]

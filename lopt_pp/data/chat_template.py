"""A chat template: what it wants of messages, and the text that it makes of them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from lopt_pp.data.cutting import Span
from lopt_pp.data.messages import Messages
from lopt_pp.errors import LoptError, first_line

_TELLING = 5
"""Characters, behind a question, that are not there by chance."""

_ASKED, _ANSWERED = "probe of a question", "probe of an answer"
_QUESTION = {"role": "user", "content": _ASKED}
_ARGUMENTS = {"probed_key": "probed value"}
_AS_TEXT = json.dumps(_ARGUMENTS)


class ChatTemplate:
    """A chat template of a tokenizer.

    Some templates want the arguments of a tool call as an object, others as JSON text, and those of models that see
    take the content of a message as parts only. Which of it is so is found by rendering a message of each kind.

    Args:
        tokenizer: of the model; it gives the special tokens.
        source: of the template; None is the tokenizer's own.

    Attributes:
        has_marks: whether it marks what the assistant generates.
        generation_prompt: what it puts before an answer; "" where that cannot be told.

    Raises:
        LoptError: the tokenizer has several templates, and none that is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._given = source
        try:
            self._source: str = tokenizer.get_chat_template(source)
        except ValueError as error:
            raise LoptError(f"the tokenizer's chat template cannot be used: {first_line(error)}") from error
        self._wants_parts = self._wants_object = self._wants_text = False
        self.has_marks = has_generation_markers(self._source)
        self._wants_parts = not self._shows_text(as_parts=False) and self._shows_text(as_parts=True)
        self.generation_prompt, self._prompts = self._find_generation_prompt()
        takes_text, takes_object = self._shows_arguments(_AS_TEXT), self._shows_arguments(_ARGUMENTS)
        self._wants_object = takes_object and not takes_text
        self._wants_text = takes_text and not takes_object

    def mentions(self, word: str) -> bool:
        """Whether the word is anywhere in it."""
        return re.search(rf"\b{re.escape(word)}\b", self._source) is not None

    def reads(self, key: str) -> bool:
        """Whether it takes something of this name out of something, such as a message."""
        return re.search(rf"""(\.|['"])\s*{re.escape(key)}\b""", self._source) is not None

    def has_made(self, prompt: str) -> bool:
        """Whether a prompt is one that the template has made, by how its question begins and ends."""
        prompt = prompt.rstrip()
        return any(prompt.endswith(end) and begin in prompt for begin, end in self._prompts)

    def fit(self, messages: Messages) -> Messages:
        """The messages as the template wants them.

        Raises:
            LoptError: it wants the arguments of a tool call as an object, and they are text that is not JSON.
        """
        return [self._fit(message) for message in messages]

    def render(self, messages: Messages, options: Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Args:
            messages: of it, as `fit` makes them.
            options: what else the template is given, such as `tools`.
            add_generation_prompt: whether to end with what comes before an answer.

        Raises:
            LoptError: the template refuses it.
        """
        given = {"chat_template": self._given, **options, "tokenize": False}
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **given)
        except Exception as error:  # A template is a program, and may fail in any way at what it was not made for.
            raise _refused(error) from error
        assert isinstance(text, str)
        return text

    def render_marked(self, messages: Messages, options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans of it that the template marks; those that touch are one.

        Raises:
            LoptError: the template refuses it.
        """
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        given = {**self._tokenizer.special_tokens_map, "chat_template": self._source, **options}
        try:
            rendered: Any = render_jinja_template([messages], return_assistant_tokens_mask=True, **given)
        except Exception as error:
            raise _refused(error) from error
        spans: list[Span] = []
        (text,), (marks,) = rendered
        for start, stop in marks:
            if start == stop:
                continue
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, stop))
        return text, spans

    def _fit(self, message: dict[str, Any]) -> dict[str, Any]:
        if (self._wants_object or self._wants_text) and isinstance(calls := message.get("tool_calls"), list):
            message = message | {"tool_calls": [self._fit_call(call) for call in calls]}
        if self._wants_parts and isinstance(content := message.get("content"), str):
            message = message | {"content": [{"type": "text", "text": content}]}
        return message

    def _fit_call(self, call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function:
            return call
        # A table makes null of the arguments of a function that takes none.
        arguments = function.get("arguments", function.get("parameters", {}))
        if self._wants_object and isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise LoptError(
                    f"the arguments of its call of {function.get('name')} are not JSON: {first_line(error)}"
                ) from error
        elif self._wants_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        fitted = function | {"arguments": arguments}
        return call | {"function": fitted} if "function" in call else fitted

    def _find_generation_prompt(self) -> tuple[str, list[tuple[str, str]]]:
        """What is put before an answer, and what stands around the question of a prompt that the template has made."""
        try:
            asked, prompted = (self.render(self.fit([_QUESTION]), {}, prompts) for prompts in (False, True))
        except LoptError:
            return "", []
        around = [
            ("", prompted.rpartition(_ASKED)[2].strip()),
            # Without the generation prompt, a question may well end so that speaks of the template's tokens.
            (asked.partition(_ASKED)[0].strip().rpartition("\n")[2], asked.rpartition(_ASKED)[2].strip()),
        ]
        known = [(begin, end) for begin, end in around if len(end) >= _TELLING and _ASKED in asked]
        return prompted[common_length(asked, prompted) :], known

    def _shows_text(self, as_parts: bool) -> bool:
        messages: Messages = [_QUESTION, {"role": "assistant", "content": _ANSWERED}]
        if as_parts:
            messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text = self.render(messages, {})
        except LoptError:
            return False
        return _ASKED in text and _ANSWERED in text

    def _shows_arguments(self, arguments: Any) -> bool:
        function = {"name": "probed", "arguments": arguments}
        call = {"id": "probed000", "type": "function", "function": function}
        try:
            text = self.render(self.fit([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]), {})
        except LoptError:
            return False
        if isinstance(arguments, str):
            return arguments in text
        as_python = str(_ARGUMENTS)
        return all(word in text for entry in _ARGUMENTS.items() for word in entry) and as_python not in text


def trl_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """TRL's copy of the tokenizer's chat template, with marks on what the assistant generates, if there is one."""
    try:
        source = get_training_chat_template(tokenizer)
    except Exception:  # Not one that TRL knows; or a program that fails in its own way at TRL's questions.
        return None
    return None if source is None else ChatTemplate(tokenizer, source)


def common_length(first: str, second: str) -> int:
    """How long two texts are the same, from their start."""
    if second.startswith(first):
        return len(first)
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low


def _refused(error: Exception) -> LoptError:
    return LoptError(f"the chat template refuses the conversation: {first_line(error)}; change the row or leave it out")

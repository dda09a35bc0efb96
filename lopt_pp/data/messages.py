"""The messages of a conversation, as chat templates take them, from the ways in which data sets write them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lopt_pp.errors import LoptError, shown

Messages = list[dict[str, Any]]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
} | {name.title(): name for name in ("user", "assistant", "system", "tool")}
"""What data sets call the roles of chat templates."""

_SHAREGPT_ROLES = _ROLES | {"observation": "tool"}
_CALL_ROLES = ("function_call", "tool_call")
"""Of messages that hold a tool call as JSON text (LLaMA-Factory, ms-swift)."""

_RESULT_ROLES = ("tool_response", "function_response", "function")
"""Of messages that hold what a tool returned (ms-swift, and OpenAI's before there were tools)."""

_FLAGS = ("loss", "train", "training")
"""Say of a message, by true or false (or 1 or 0), whether it is learned (ms-swift, Axolotl); OpenAI has `weight`."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""What a message may call its reasoning; `transformers` gives templates the one that they read."""

STANDARD_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", *REASONING_KEYS})
"""Of a message, whether a template reads them or not."""


@dataclass(frozen=True)
class Turns:
    """The messages of a column.

    Attributes:
        messages: each with `role` and `content`, at least.
        skipped: the numbers, from 0, of the assistant's messages that are not to be learned.
    """

    messages: Messages
    skipped: frozenset[int] = frozenset()


def read_messages(given: Sequence[Any], column: str) -> Turns:
    """The messages of a column, written as chat templates take them.

    - ShareGPT's `from` and `value` become `role` and `content`, and its roles those of chat templates.
    - A message of the role `function_call` or `tool_call`, and the key `function_call` of OpenAI, become `tool_calls`
      of the assistant; what a tool returned becomes a message of the role `tool`.
    - Parts of text become one string. Entries that are None are taken out, also inside tool calls: tables fill what one
      row has and another lacks with None.
    - `weight`, `loss`, `train` or `training` of false or 0 say that an answer is not to be learned.

    Raises:
        LoptError: a message is malformed, or has parts that are not text.
    """
    messages: Messages = []
    skipped: set[int] = set()
    calls_before = False
    for number, original in enumerate(given, 1):
        name = f"message {number} of `{column}`"
        try:
            message = _read_message(original, name)
        except RecursionError as error:
            raise LoptError(f"{name} lies too deep in itself") from error
        is_learned = _take_flags(message, name)
        is_call = message["role"] in _CALL_ROLES
        if is_call:
            message = _read_call(message, name)
        if is_call and calls_before and "content" not in message:
            messages[-1]["tool_calls"] += message["tool_calls"]  # Calls in a row were made together.
        else:
            messages.append({"role": message["role"], "content": "", **message})
        if not is_learned:
            skipped.add(len(messages) - 1)
        calls_before = is_call
    return Turns(messages, frozenset(skipped))


def without_nulls(value: Any) -> Any:
    """A value without the None entries of its mappings, however deep. Those of lists stay: none is filled in there."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _read_message(original: Any, name: str) -> dict[str, Any]:
    message = without_nulls(original) if isinstance(original, dict) else {}
    if "from" in message:
        role = message.pop("from")
        message["role"] = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if isinstance(role, str):
        message["role"] = role = _ROLES.get(role, role)
    if role in _RESULT_ROLES:
        message["role"] = "tool"
    if isinstance(message.get("function_call"), dict):
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if isinstance(calls := message.get("tool_calls"), str):
        message["tool_calls"] = _parse(calls, f"the `tool_calls` of {name}")
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if "tool_calls" in message:
        message.setdefault("content", "")
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    are_calls = role in _CALL_ROLES and all(isinstance(part, dict) and "text" not in part for part in parts)
    if isinstance(content, list) and not are_calls:
        message["content"] = content = "".join(_text_of(part, name) for part in content)
    if not isinstance(role, str) or not (isinstance(content, str) or are_calls):
        raise LoptError(f"{name} must have the strings `role` and `content`, but is {shown(original)}")
    return message


def _text_of(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            return str(part["text"])
        if isinstance(kind, str) and kind != "text":
            raise LoptError(f"{name} has a part of type {shown(kind)}, and only text is trained on; leave the row out")
    raise LoptError(f"{name} has a part that is not text: {shown(part)}; leave the row out")


def _take_flags(message: dict[str, Any], name: str) -> bool:
    """Takes out what says whether a message is learned, and returns whether it is."""
    said = {key: bool(message.pop(key)) for key in _FLAGS if _is_flag(message.get(key))}
    if "weight" in message:
        said["weight"] = message.pop("weight")
        if not _is_flag(said["weight"]):
            raise LoptError(f"the `weight` of {name} is {shown(said['weight'])}; give 0 (not learned) or 1")
    if message["role"] not in ("assistant", *_CALL_ROLES):
        if any(said.values()):
            key = next(key for key, value in said.items() if value)
            raise LoptError(
                f"{name} is to be learned by its `{key}`, but only the assistant's are, and its role is "
                f"{shown(message['role'])}"
            )
        return True
    return all(said.values())


def _is_flag(value: Any) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _read_call(message: dict[str, Any], name: str) -> dict[str, Any]:
    """The assistant's message that makes the calls which a message holds as JSON, behind reasoning if it has some."""
    content, rest = message.pop("content"), {}
    if isinstance(content, str):
        thought, closing, said = content.rpartition("</think>")
        if closing:
            rest["content"] = thought + closing
        content = _parse(said, name)
    calls = content if isinstance(content, list) else [content]
    tool_calls = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LoptError(f"{name} must hold a tool call with a `name` and `arguments`, but holds {shown(call)}")
        arguments = function.get("arguments", function.get("parameters", {}))
        tool_calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return {**message, "role": "assistant", "tool_calls": tool_calls, **rest}


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoptError(f"{name} must be JSON of tool calls, but is {shown(text)}") from error

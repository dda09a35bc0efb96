"""What is made of the ways in which data sets write messages, and of the columns beside them."""

import json
from typing import Any

import pytest
from chat import ANSWER, CHATML, END, MARKED, QUESTION, START, make_tokenizer, text_of
from trl_templates import decoded, source, tokenizer_for

from lopt_pp.data.encoding import Note, RowEncoder
from lopt_pp.data.formats import Conversation, Format, Pair, read_row
from lopt_pp.errors import LoptError


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call_of(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "sunny"}
CALLS = assistant("", tool_calls=[call_of({"city": "Rome"})])
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Rome"}}'


def said(*turns: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in turns]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"instruction": "q", "input": "", "output": "ab", "system": "s", "history": [["one", "two"]]},
            [SYSTEM, user("one"), assistant("two"), QUESTION, ANSWER],
        ),
        (
            {"query": "q", "response": "ab", "history": [["one", "two"]]},
            [user("one"), assistant("two"), QUESTION, ANSWER],
        ),
        ({"system": "s", "query": "q", "response": "ab", "history": []}, [SYSTEM, QUESTION, ANSWER]),
        ({"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "ab"}]}, [QUESTION, ANSWER]),
        ({"messages": [{"role": "User", "content": "q"}, {"role": "ai", "content": "ab"}]}, [QUESTION, ANSWER]),
        ({"messages": [QUESTION, ANSWER], "system": "s"}, [SYSTEM, QUESTION, ANSWER]),
        ({"messages": [SYSTEM, QUESTION, ANSWER], "system": "s"}, [SYSTEM, QUESTION, ANSWER]),
        ({"conversations": said(("human", "q"), ("gpt", "ab")), "system": "s"}, [SYSTEM, QUESTION, ANSWER]),
        (
            {
                "conversations": said(
                    ("human", "q"), ("function_call", CALL_TEXT), ("observation", "sunny"), ("gpt", "ab")
                )
            },
            [QUESTION, CALLS, TOOL, ANSWER],
        ),
        (
            {
                "messages": [
                    QUESTION,
                    {"role": "tool_call", "content": CALL_TEXT},
                    {"role": "tool_response", "content": "sunny"},
                ]
            },
            [QUESTION, CALLS, TOOL],
        ),
        # Calls in a row are made together, and reasoning stays in front of them.
        (
            {"messages": [QUESTION, *[{"role": "tool_call", "content": CALL_TEXT}] * 2]},
            [QUESTION, assistant("", tool_calls=CALLS["tool_calls"] * 2)],
        ),
        (
            {"conversations": said(("human", "q"), ("function_call", "<think>look</think>" + CALL_TEXT))},
            [QUESTION, CALLS | {"content": "<think>look</think>"}],
        ),
        # OpenAI's, before there were tools.
        (
            {"messages": [QUESTION, assistant(None, function_call={"name": "weather", "arguments": "{}"})]},
            [QUESTION, assistant("", tool_calls=[call_of("{}")])],
        ),
        (
            {"messages": [QUESTION, {"role": "function", "name": "f", "content": "sunny"}]},
            [QUESTION, TOOL | {"name": "f"}],
        ),
        ({"messages": [QUESTION, assistant("ab", tool_calls=[])]}, [QUESTION, ANSWER]),
        (
            {"messages": [QUESTION, assistant(None, tool_calls=json.dumps(CALLS["tool_calls"]))]},
            [QUESTION, CALLS],
        ),
        # Parts of text, as tables fill them.
        (
            {"messages": [user([{"type": "text", "text": "q", "image_url": None}]), assistant([{"text": "a"}, "b"])]},
            [QUESTION, ANSWER],
        ),
        # Nulls that a table has filled in.
        (
            {
                "messages": [
                    QUESTION,
                    assistant(None, tool_calls=[call_of({"city": "Rome", "a": None, "b": {"c": None}})]),
                ]
            },
            [QUESTION, assistant("", tool_calls=[call_of({"city": "Rome", "b": {}})])],
        ),
    ],
)
def test_messages(row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    given = json.dumps(row)
    shape = read_row(row)
    assert isinstance(shape, Conversation) and shape.messages == messages and not shape.prompt_length
    assert json.dumps(row) == given, "the row is left as it is"


def test_a_system_message_is_part_of_the_prompt() -> None:
    shape = read_row({"prompt": [QUESTION], "completion": [ANSWER], "system": "s"})
    assert shape == Conversation([SYSTEM, QUESTION, ANSWER], prompt_length=2)


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"loss": False},
        {"loss": 0},
        {"train": False},
        {"train": 0.0},
        {"training": False},
    ],
)
def test_answers_that_are_not_to_be_learned(flag: dict[str, Any]) -> None:
    row = {"messages": [SYSTEM, user("x"), assistant("no", **flag), QUESTION, ANSWER | {"weight": 1}]}
    shape = read_row(row)
    assert shape == Conversation([SYSTEM, user("x"), assistant("no"), QUESTION, ANSWER], skipped=frozenset({2}))
    for template in (CHATML, MARKED):
        for flags in (dict[str, Any](), {"assistant_only_loss": False}):
            tokenizer = make_tokenizer(template)
            encoded = RowEncoder(tokenizer, **flags)(row)
            assert encoded is not None
            text = text_of(tokenizer, encoded)
            assert f"[[ab{END}" in text if not flags else f"\n[[{START}user" in text
            assert f"]]{START}assistant\nno{END}\n" in text or f"{START}assistant\nno{END}\n{START}user" in text
            assert "[[no" not in text


def test_nothing_counts_where_no_answer_is_to_be_learned() -> None:
    encoded = RowEncoder(make_tokenizer(CHATML))({"messages": [QUESTION, ANSWER | {"weight": 0}]})
    assert encoded is not None and encoded.num_targets == 0 and not encoded.unusable


def test_what_follows_the_last_answer_that_counts_is_cut() -> None:
    encoded = RowEncoder(make_tokenizer(CHATML))({"messages": [QUESTION, ANSWER, QUESTION, ANSWER | {"weight": 0}]})
    assert encoded is not None and encoded.notes == Note.TAIL_CUT


def options(shape: Format) -> dict[str, Any]:
    assert isinstance(shape, Conversation | Pair)
    return shape.options


def test_tools() -> None:
    """Nulls of tables are taken out, those in JSON text stay; ShareGPT's tools get what templates expect around one."""
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", None], "default": None}, "other": None}}
    cleaned = {"type": "object", "properties": {"unit": {"enum": ["C", None]}}}
    tool = {"type": "function", "function": {"name": "w", "parameters": schema}}
    row = {"messages": [QUESTION, ANSWER]}
    assert options(read_row(row | {"tools": [tool]}))["tools"][0]["function"]["parameters"] == cleaned
    assert options(read_row(row | {"tools": json.dumps([tool])})) == {"tools": [tool]}
    assert options(read_row(row | {"tools": [json.dumps(tool)]})) == {"tools": [tool]}
    assert options(read_row(row | {"tools": ""})) == options(read_row(row | {"tools": "[]"})) == {}
    bare = {"name": "w", "parameters": {"type": "object"}}
    sharegpt = {"conversations": said(("human", "q"), ("gpt", "ab")), "tools": json.dumps([bare])}
    assert options(read_row(sharegpt)) == {"tools": [{"type": "function", "function": bare}]}
    assert options(read_row(row | {"tools": [bare]})) == {"tools": [bare]}, "as TRL takes them"
    assert options(read_row(row | {"functions": [bare]})) == {"tools": [{"type": "function", "function": bare}]}
    assert (
        options(read_row({"question": "q", "answer": "ab", "tools": [tool | {"x": None}]}))["tools"][0].keys()
        == tool.keys()
    )


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"messages": [user([{"type": "image_url", "image_url": {}}])]},
            "message 1 .* part of type 'image_url', and only",
        ),
        ({"messages": [user([{"type": "text", "text": None}])]}, "message 1 of `messages` has a part that is not text"),
        ({"messages": [user([3])]}, "has a part that is not text: 3"),
        ({"messages": [QUESTION, ANSWER], "images": ["a.png"]}, "`images` holds more than text"),
        ({"query": "q", "response": "ab", "videos": ["a.mp4"]}, "`videos` holds more than text"),
        (
            {"messages": [SYSTEM, QUESTION], "system": "another"},
            "column `system` and another system message as its first",
        ),
        ({"query": "q", "response": "ab", "system": 3}, r"`system` must be a string, but is 3 \(int\)"),
        (
            {"query": "q", "response": "ab", "history": [["one"]]},
            r"`history` must be a list of pairs .* but holds \['one'\]",
        ),
        ({"query": "q", "response": "ab", "history": "one"}, "`history` must be a list of pairs"),
        ({"messages": [QUESTION, ANSWER | {"weight": 0.5}]}, "the `weight` of message 2 of `messages` is 0.5; give 0"),
        (
            {"messages": [QUESTION | {"weight": 1}, ANSWER]},
            "message 1 .* to be learned by its `weight`, .* role is 'user'",
        ),
        (
            {"conversations": said(("function_call", "no JSON"))},
            "message 1 of `conversations` must be JSON of tool calls",
        ),
        ({"conversations": said(("function_call", "[3]"))}, "must hold a tool call with a `name` .* but holds 3"),
        ({"messages": [QUESTION, ANSWER], "tools": {"a": 1}}, "`tools` must be a list or JSON of one"),
    ],
)
def test_what_cannot_be_used_is_refused(row: dict[str, Any], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        read_row(row)


@pytest.mark.parametrize(
    ("row", "unused"),
    [
        ({"messages": [QUESTION, ANSWER], "id": 3, "source": "s", "empty": "", "null": None}, ("id", "source")),
        ({"messages": [QUESTION, ANSWER], "chosen": "x", "history": [["a", "b"]]}, ("chosen", "history")),
        ({"messages": [QUESTION, ANSWER], "conversations": said(("human", "q"))}, ("conversations",)),
        ({"instruction": "q", "output": "ab", "text": "q ab"}, ("text",)),
        ({"question": "q", "answer": "ab", "context": "c"}, ("context",)),
        ({"text": "ab", "meta": {"a": 1}}, ("meta",)),
        ({"input_ids": [5, 6], "attention_mask": [1, 1], "length": 2}, ("length",)),
        ({"messages": [QUESTION | {"date": "x"}, ANSWER | {"name": "y"}]}, ("messages.date",)),
        ({"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]}, ("tools",)),
        ({"messages": [QUESTION | {"tools": "[]"}, ANSWER], "tools": []}, ("messages.tools",)),
        (
            {"question": "q", "answer": "ab", "chat_template_kwargs": {"enable_thinking": False}},
            ("chat_template_kwargs.enable_thinking",),
        ),
    ],
)
def test_columns_that_are_not_used_are_named(row: dict[str, Any], unused: tuple[str, ...]) -> None:
    encoded = RowEncoder(make_tokenizer(CHATML))(row)
    assert encoded is not None and encoded.unused == unused


def test_a_key_that_the_template_reads_is_used() -> None:
    encoded = RowEncoder(make_tokenizer("{{ messages[0]['date'] }}" + CHATML))(
        {"prompt": [QUESTION | {"date": "x"}], "completion": [ANSWER]}
    )
    assert encoded is not None and encoded.unused == ()


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("qwen2_5", '{"city": "Rome"}', '"arguments": {"city": "Rome"}}\n</tool_call>'),
        ("qwen2_5", {"city": "Rome"}, '"arguments": {"city": "Rome"}}\n</tool_call>'),
        ("qwen2_5", None, '"arguments": {}}\n</tool_call>'),
        # It takes both, and JSON text as it is.
        ("qwen3", '{"city":"Rome"}', '"arguments": {"city":"Rome"}}\n</tool_call>'),
        ("glm4moe", '{"city": "Rome"}', "<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>"),
        ("llama3_1", '{"city": "Rome"}', '{"name": "weather", "parameters": {"city": "Rome"}}'),
        # TRL's copy takes an object.
        ("deepseekv3", '{"city": "Rome"}', '```json\n{"city": "Rome"}\n```'),
        ("deepseekv3", {"city": "Rome"}, '```json\n{"city": "Rome"}\n```'),
    ],
)
def test_arguments_are_given_as_the_template_wants_them(name: str, given: Any, wanted: str) -> None:
    tokenizer = tokenizer_for(source(name))
    row = {"messages": [user("q"), assistant("", tool_calls=[call_of(given)]), TOOL, assistant("Sunny.")]}
    encoded = RowEncoder(tokenizer)(row)
    assert encoded is not None and not encoded.unusable
    assert wanted in decoded(tokenizer, encoded)


def test_arguments_that_are_not_json_are_refused_where_an_object_is_wanted() -> None:
    row = {"messages": [user("q"), assistant("", tool_calls=[call_of("city=Rome")])]}
    with pytest.raises(LoptError, match="the arguments of its call of weather are not JSON"):
        RowEncoder(tokenizer_for(source("qwen2_5")))(row)


def test_tools_need_a_template() -> None:
    with pytest.raises(LoptError, match="it has `tools`, and the tokenizer has no chat template"):
        RowEncoder(make_tokenizer())({"question": "q", "answer": "ab", "tools": [{"name": "f"}]})
    with pytest.raises(LoptError, match="it is a conversation, and the tokenizer has no chat template"):
        RowEncoder(make_tokenizer())({"question": "q", "answer": "ab", "system": "s"})

"""What the columns of a row say it is, and what the flags make of it."""

from typing import Any

import pytest
from chat import ANSWER, CHAT_PROMPT, CHATML, END, MARKED, QUESTION, REWRITING, START, make_tokenizer, spell
from trl.chat_template_utils import qwen2_5_chat_template, qwen3_chat_template

from lopt_pp.data.encoding import Note, RowEncoder
from lopt_pp.data.formats import Conversation, Pair, Text, Tokens, read_row
from lopt_pp.errors import LoptError

FOLLOW_UP = {"role": "user", "content": "more"}


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"messages": [QUESTION, ANSWER]}, Conversation([QUESTION, ANSWER])),
        ({"conversations": [QUESTION, ANSWER]}, Conversation([QUESTION, ANSWER])),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ab"}]},
            Conversation([QUESTION, ANSWER]),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "q"},
                    {"from": "assistant", "value": "ab"},
                ]
            },
            Conversation([{"role": "system", "content": "s"}, QUESTION, ANSWER]),
        ),
        ({"prompt": [QUESTION], "completion": [ANSWER]}, Conversation([QUESTION, ANSWER], prompt_length=1)),
        ({"prompt": "q", "completion": "ab"}, Pair("q", "ab", "q")),
        ({"question": "q", "answer": "ab"}, Pair("q", "ab", "q\n")),
        ({"query": "q", "response": "ab", "type": "GSM_Rephrased"}, Pair("q", "ab", "q\n")),
        ({"problem": "q", "solution": "ab"}, Pair("q", "ab", "q\n")),
        ({"instruction": "q", "output": "ab", "input": ""}, Pair("q", "ab", "q\n")),
        ({"instruction": "q", "input": "i", "output": "ab", "text": "ignored"}, Pair("q\n\ni", "ab", "q\n\ni\n")),
        ({"text": "ab", "prompt": None}, Text("ab")),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, Tokens([1, 2], [-100, 2])),
        ({"input_ids": [1, 2, 3]}, Tokens([1, 2, 3], [1, 2, 3])),
        ({"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]}, Tokens([1, 2, 3], [-100, 2, 3])),
        (
            {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]},
            Tokens([1, 2, 3], [-100, -100, 3]),
        ),
    ],
)
def test_columns_decide(row: dict[str, Any], shape: object) -> None:
    assert read_row(row) == shape


@pytest.mark.parametrize(
    ("mask", "start", "stop"), [([0, 1, 1], 1, 3), ([True, True, False], 0, 2), ([1, 1, 1], 0, 3), ([0, 0, 0], 0, 0)]
)
@pytest.mark.parametrize("labels", [None, [-100, 2, 3]])
def test_padding_of_tokens_is_taken_out(mask: list[int], start: int, stop: int, labels: list[int] | None) -> None:
    shape = read_row({"input_ids": [1, 2, 3], "attention_mask": mask, "labels": labels})
    assert shape == Tokens([1, 2, 3][start:stop], (labels or [1, 2, 3])[start:stop])


def test_text_may_be_in_another_column() -> None:
    assert read_row({"content": "ab", "text": "no"}, text_field="content") == Text("ab")
    with pytest.raises(
        LoptError, match=r"no usable columns \(it has: text\); a row needs .*; or content; --dataset_mapping"
    ):
        read_row({"text": "ab"}, text_field="content")


def test_rows_are_left_as_they_are() -> None:
    row = {"conversations": [{"from": "human", "value": "q"}]}
    read_row(row)
    assert row == {"conversations": [{"from": "human", "value": "q"}]}


def test_tools_reach_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}], "name": None}
    shape = read_row({"messages": [QUESTION, call], "tools": '[{"type": "function", "function": {"name": "add"}}]'})
    assert isinstance(shape, Conversation)
    assert shape.options == {"tools": tools}
    assert shape.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    template = "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + CHATML
    encoded = RowEncoder(make_tokenizer(template))({"messages": [QUESTION, ANSWER], "tools": tools})
    assert encoded is not None
    assert make_tokenizer().convert_ids_to_tokens(encoded.input_ids)[:4] == ["a", "d", "d", START]


def test_options_of_the_template() -> None:
    row = {"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"style": "x", "absent": None}}
    encoded = RowEncoder(make_tokenizer("{{ style }}" + CHATML))(row)
    assert encoded is not None and make_tokenizer().convert_ids_to_tokens(encoded.input_ids)[:2] == ["x", START]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"input_ids": [1, 2], "completion_mask": [1]}, "`input_ids` has 2 entries and `completion_mask` 1"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "`input_ids` has 2 entries and `attention_mask` 1"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "`attention_mask` leaves out tokens between others"),
        ({"messages": [QUESTION], "tools": "{"}, "`tools` must be a list or JSON of one, but is '{'"),
        ({"messages": [QUESTION], "chat_template_kwargs": "x"}, "`chat_template_kwargs` must be a mapping"),
        ({"conversations": [{"from": "human"}]}, r"message 1 of `conversations` must have .*'from': 'human'"),
        ({"messages": ["hello"]}, "message 1 of `messages` must have the strings `role` and `content`, but is 'hello'"),
    ],
)
def test_malformed_row(row: dict[str, Any], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        read_row(row)


CHAT = (START, "user\nq", END, "\n", START, "assistant\n", "ab", END, "\n")


def targets(row: dict[str, Any], template: str | None = CHATML, **flags: Any) -> list[str]:
    """The tokens on which the loss counts."""
    tokenizer = make_tokenizer(template)
    encoded = RowEncoder(tokenizer, **flags)(row)
    assert encoded is not None
    return [str(tokenizer.convert_ids_to_tokens(label)) for label in encoded.labels if label != -100]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_all_of_a_conversation_counts_if_asked_for(template: str) -> None:
    row = {"messages": [QUESTION, ANSWER, FOLLOW_UP]}
    all_of_it = spell((*CHAT, START, "user\nmore", END, "\n"))
    assert targets(row, template, assistant_only_loss=False) == all_of_it
    assert targets(row, template) == spell(("ab", END, *("\n" if template == CHATML else "")))


@pytest.mark.parametrize("row", [{"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER, FOLLOW_UP, ANSWER]}])
def test_which_of_a_completion_counts(row: dict[str, Any]) -> None:
    answer, between = ("ab", END, "\n"), (START, "user\nmore", END, "\n", START, "assistant\n")
    assert targets(row) == spell((*answer, *answer))
    assert targets(row, assistant_only_loss=False) == spell((*answer, *between, *answer))
    assert targets(row, completion_only_loss=True) == spell((*answer, *between, *answer))
    assert targets(row, assistant_only_loss=True, completion_only_loss=True) == spell((*answer, *answer))
    answers = targets(row, assistant_only_loss=True, completion_only_loss=False)
    assert answers == spell((*answer, *answer, *answer))
    everything = (*CHAT, *CHAT_PROMPT, *answer, *between, *answer)
    for assistant_only in (None, False):
        flags: dict[str, Any] = {"assistant_only_loss": assistant_only, "completion_only_loss": False}
        assert targets(row, **flags) == spell(everything)


def test_the_prompt_counts_too_if_asked_for() -> None:
    row = {"question": "q", "answer": "ab"}
    assert targets(row, completion_only_loss=False) == spell(CHAT)
    assert targets(row, None, completion_only_loss=False) == spell(("<s>", "q\n", "ab", END))
    assert targets(row, None) == ["ab", END]


def test_trl_marks_a_template_that_rewrites_and_that_it_knows() -> None:
    """Qwen 3's drops the reasoning of earlier turns; Qwen 2.5's leaves turns as they are."""
    row = {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}
    assert targets(row, qwen2_5_chat_template) == spell(("\n", "ab", END, "\n") * 2)  # So does TRL mark its prompt.
    think = "<think>\n\n</think>\n\n"
    assert targets(row, qwen3_chat_template) == spell((think, "ab", END, "\n") * 2)


def test_what_was_changed_is_noted() -> None:
    def notes(messages: list[dict[str, str]], template: str) -> Note:
        encoded = RowEncoder(make_tokenizer(template))({"messages": messages})
        assert encoded is not None
        return encoded.notes

    assert notes([QUESTION, ANSWER], CHATML) == Note(0)
    assert notes([QUESTION, ANSWER, QUESTION], CHATML) == notes([QUESTION, ANSWER, QUESTION], MARKED) == Note.TAIL_CUT
    assert notes([QUESTION, ANSWER, QUESTION, ANSWER], REWRITING) == Note.ONLY_LAST_ANSWER
    assert notes([QUESTION, ANSWER, QUESTION, ANSWER, QUESTION], REWRITING) == Note.ONLY_LAST_ANSWER | Note.TAIL_CUT

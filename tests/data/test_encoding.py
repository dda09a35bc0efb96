"""What each shape of row becomes, token by token."""

from collections.abc import Sequence
from typing import Any

import pytest
from chat import ANSWER, BOS, CHAT_PROMPT, CHATML, END, MARKED, QUESTION, REWRITING, START, make_tokenizer, spell
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerFast

from lopt_pp.data.encoding import EncodedRow, Note, RowEncoder
from lopt_pp.errors import LoptError


def encode(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> EncodedRow:
    """A row that is not left out."""
    encoded = RowEncoder(tokenizer)(row)
    assert encoded is not None
    return encoded


def check(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], *expected: tuple[Sequence[str], bool]) -> None:
    """The row is encoded to the expected runs of tokens, each with or without a loss."""
    encoded = encode(tokenizer, row)
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == [t for parts, _ in expected for t in spell(parts)]
    targets = [is_target for parts, is_target in expected for _ in spell(parts)]
    assert encoded.labels == [i if is_target else -100 for i, is_target in zip(encoded.input_ids, targets, strict=True)]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"prompt": "q", "completion": "ab"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"question": "q", "answer": "ab"},
        {"instruction": "q", "output": "ab"},
        {"instruction": "q", "input": "", "output": "ab", "text": "ignored"},
        {"messages": [QUESTION, ANSWER, QUESTION], "prompt": None},
    ],
)
def test_chat_template_renders_prompts(row: dict[str, Any]) -> None:
    check(make_tokenizer(CHATML), row, (CHAT_PROMPT, False), (("ab", END, "\n"), True))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "completion": "ab"}, "q"),
        ({"question": "q", "answer": "ab"}, "q\n"),
        ({"instruction": "q", "output": "ab"}, "q\n"),
        ({"instruction": "q", "input": "i", "output": "ab"}, "q\n\ni\n"),
    ],
)
def test_without_template(row: dict[str, Any], prompt: str) -> None:
    check(make_tokenizer(), row, ((BOS, prompt), False), (("ab", END), True))


RENDERED = f"{START}user\nq{END}\n"


@pytest.mark.parametrize("prompt", [f"{RENDERED}{START}assistant\n", f"{RENDERED}{START}assistant", RENDERED])
@pytest.mark.parametrize("end", ["", END, f"{END}\n"])
def test_a_prompt_that_the_template_has_made_is_not_put_through_it_again(prompt: str, end: str) -> None:
    tokenizer = make_tokenizer(CHATML)
    encoded = encode(tokenizer, {"prompt": prompt, "completion": f"ab{end}"})
    bare = make_tokenizer()
    assert encoded.input_ids == encode(bare, {"prompt": prompt, "completion": f"ab{end}"}).input_ids
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 2 and encoded.notes == Note.RENDERED
    for question in ("assistant", f"x {END}"):
        encoded = encode(tokenizer, {"prompt": question, "completion": "b"})
        assert encoded.notes == Note(0) and encoded.input_ids.count(tokenizer.eos_token_id) == 2 + (END in question)


def test_instruction_and_input_share_the_user_turn() -> None:
    row = {"instruction": "q", "input": "i", "output": "ab"}
    prompt = (START, "user\nq\n\ni", END, "\n", START, "assistant\n")
    check(make_tokenizer(CHATML), row, (prompt, False), (("ab", END, "\n"), True))


def test_text_counts_whole_and_ends_once() -> None:
    check(make_tokenizer(CHATML), {"text": "xab"}, ((BOS, "x", "ab", END), True))
    check(make_tokenizer(), {"text": f"x{END}"}, ((BOS, "x", END), True))
    check(make_tokenizer(), {"text": f"x{END}\n"}, ((BOS, "x", END, "\n"), True))
    assert encode(make_tokenizer(), {"text": ""}).input_ids == []


@pytest.mark.parametrize("ending", [END, f"{END}\n"])
def test_an_answer_that_has_its_stop_token_ends_once(ending: str) -> None:
    """The template puts one there, too."""
    tokenizer = make_tokenizer(CHATML)
    for row, answer in (
        ({"prompt": "x", "completion": "ab"}, {"prompt": "x", "completion": f"ab{ending}"}),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "ab"}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": f"ab{ending}"}]},
        ),
    ):
        assert encode(tokenizer, answer) == encode(tokenizer, row)
    assert encode(tokenizer, {"prompt": "x", "completion": ending}).unusable == "with an empty answer"


def test_tokenized_row_is_used_as_it_is() -> None:
    encoded = encode(make_tokenizer(), {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "text": "ignored"})
    assert (encoded.input_ids, encoded.labels) == ([5, 6, 7], [-100, 6, 7])


def test_no_token_reaches_over_the_start_of_an_answer() -> None:
    check(make_tokenizer(), {"prompt": "a", "completion": "b"}, ((BOS, "a"), False), (("b", END), True))


def test_no_space_is_put_before_an_answer() -> None:
    tokenizer = make_tokenizer(metaspace=True)
    assert tokenizer.tokenize("x") == ["▁", "x"]
    check(tokenizer, {"prompt": "q", "completion": "x"}, ((BOS, "▁q"), False), (("x", END), True))


def test_every_assistant_turn_counts() -> None:
    messages = [{"role": "system", "content": "s"}, QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "c"}]
    check(
        make_tokenizer(CHATML),
        {"messages": messages},
        ((START, "system\ns", END, "\n", *CHAT_PROMPT), False),
        (("ab", END, "\n"), True),
        (CHAT_PROMPT, False),
        (("c", END, "\n"), True),
    )


def test_only_the_completion_counts_of_message_lists() -> None:
    row = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}
    prompt = (*CHAT_PROMPT, "ab", END, "\n", *CHAT_PROMPT)
    check(make_tokenizer(MARKED), row, (prompt, False), (("ab", END, "\n"), True))


def test_generation_marks_decide() -> None:
    opening = ((START, "assistant\n"), False), (("ab", END), True), (("\n",), False)
    messages = [ANSWER, QUESTION, ANSWER, QUESTION]
    check(
        make_tokenizer(MARKED),
        {"messages": messages},
        *opening,
        (CHAT_PROMPT, False),
        (("ab", END), True),
        (("\n",), False),
    )


def test_rewriting_template_leaves_the_last_answer() -> None:
    check(
        make_tokenizer(REWRITING),
        {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]},
        ((*CHAT_PROMPT, "ab", END, "\n", *CHAT_PROMPT), False),
        (("T", "ab", END, "\n"), True),
    )


@pytest.mark.parametrize("messages", [[], [QUESTION], [ANSWER], [ANSWER, QUESTION]])
def test_conversation_without_answer_has_no_target(messages: list[dict[str, str]]) -> None:
    assert encode(make_tokenizer(CHATML), {"messages": messages}).labels == []


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (None, "the tokenizer has no chat template; give one by --chat_template_path"),
        ("{{ messages | length }}" + CHATML, "the answer's tokens cannot be told"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        (MARKED + "{{ raise_exception('not today') }}", "refuses the conversation: not today"),
    ],
)
def test_conversation_that_the_template_cannot_render(template: str | None, error: str) -> None:
    with pytest.raises(LoptError, match=error):
        RowEncoder(make_tokenizer(template))({"messages": [QUESTION, ANSWER]})


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"foo": 1, "bar": "x", "text": None},
            r"no usable columns \(it has: foo, bar\).*input_ids; or messages; or conversations",
        ),
        ({"text": None}, r"no usable columns \(it has: none that is filled\)"),
        ({"question": "q", "answer": 4}, r"`answer` must be a string, but is 4 \(int\)"),
        ({"messages": "hello"}, "`messages` must be a list of messages, but is 'hello'"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "message 2 of `messages` must have the strings"),
        ({"prompt": [QUESTION], "completion": "x"}, "`completion` must be a list of messages, as `prompt` is"),
        ({"prompt": "x", "completion": [ANSWER]}, "`completion` must be a string"),
        ({"input_ids": [1, 2], "labels": [1]}, "`input_ids` has 2 entries and `labels` 1"),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, "`input_ids` must be a list of integers"),
        ({"input_ids": "[1, 2]", "labels": [1, 2]}, "`input_ids` must be a list of integers, but is .*str"),
        ({"input_ids": [1, 9999], "labels": [1, 2]}, "`input_ids` holds 9999, but the tokenizer has the ids 0 to 100"),
        ({"input_ids": [1, -100], "labels": [1, 2]}, "`input_ids` holds -100"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, r"`labels` holds -1, .* \(or -100"),
    ],
)
def test_malformed_row(row: dict[str, Any], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        RowEncoder(make_tokenizer(CHATML))(row)


def test_what_was_encoded_makes_no_other_encoder() -> None:
    """The cache of tokenized rows goes by the encoder."""
    encoder = RowEncoder(make_tokenizer(CHATML))
    before = Hasher.hash(encoder)
    encoder({"messages": [QUESTION, ANSWER]})
    assert Hasher.hash(encoder) == before


def test_end_of_sequence_token_is_needed() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(LoptError, match="no end-of-sequence token"):
        RowEncoder(tokenizer)({"text": "x"})

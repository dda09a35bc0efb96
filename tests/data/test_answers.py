"""What counts of a row holds its answer and ends in a stop token; what does not is left out, with the reason."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from chat import ANSWER, BOS, CHATML, END, MARKED, QUESTION, REWRITING, START, make_tokenizer, text_of
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from lopt_pp.data import DataConfig, load_rows
from lopt_pp.data.encoding import EncodedRow, Note, RowEncoder
from lopt_pp.errors import LoptError

# The reasoning of an answer is left out, as by DeepSeek-R1's.
STRIPPING = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
# The token that ends an answer is put before the next question, or not at all.
ENDING_LATE = """\
{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '\n' }}{% else %}{{ 'A:' + m.content }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"""
MARKED_BUT_ITS_END = MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}<|im_end|>")
CALL = {"id": "c", "type": "function", "function": {"name": "look", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THINKING = {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\nab"}
EMPTY = {"role": "assistant", "content": " \n"}


def encode(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **flags: Any) -> EncodedRow:
    encoded = RowEncoder(tokenizer, **flags)(row)
    assert encoded is not None
    return encoded


LOST = "whose {} the chat template leaves out"


@pytest.mark.parametrize(
    ("template", "row", "unusable"),
    [
        (CHATML, {"messages": [QUESTION, EMPTY]}, "with an empty answer"),
        (MARKED, {"messages": [QUESTION, ANSWER, QUESTION, EMPTY]}, "with an empty answer"),
        (CHATML, {"question": "q", "answer": ""}, "with an empty answer"),
        (CHATML, {"prompt": [QUESTION], "completion": [EMPTY]}, "with an empty answer"),
        (None, {"question": "q", "answer": ""}, "with an empty answer"),
        (
            CHATML,
            {"messages": [QUESTION, {"role": "assistant", "content": "<think>so</think>"}]},
            "with an empty answer",
        ),
        (CHATML, {"messages": [QUESTION, CALLING, ANSWER]}, LOST.format("tool call")),
        (MARKED, {"messages": [QUESTION, CALLING]}, LOST.format("tool call")),
        (STRIPPING, {"messages": [QUESTION, THINKING]}, LOST.format("reasoning")),
        (STRIPPING, {"question": "q", "answer": THINKING["content"]}, LOST.format("reasoning")),
        (CHATML, {"messages": [QUESTION, ANSWER | {"reasoning_content": "Add."}]}, LOST.format("reasoning")),
        (
            CHATML.replace("message['content']", "message['content'][:1]"),
            {"question": "q", "answer": "ab"},
            LOST.format("answer"),
        ),
        # Also of answers that do not count, since the conversation is not what the row says.
        (
            REWRITING,
            {"messages": [QUESTION, CALLING, QUESTION, ANSWER]},
            LOST.format("tool call"),
        ),
        (
            MARKED.replace("'<|im_end|>' }}{% endg", "('' if loop.last else '<|im_end|>') }}{% endg"),
            {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]},
            "whose answer does not end in a stop token",
        ),
    ],
)
def test_a_row_whose_answer_is_not_learned_is_left_out(
    template: str | None, row: dict[str, Any], unusable: str
) -> None:
    encoded = encode(make_tokenizer(template), row)
    assert (encoded.unusable, encoded.input_ids, encoded.labels) == (unusable, [], [])


@pytest.mark.parametrize(
    ("template", "row"),
    [
        (CHATML, {"messages": [QUESTION, THINKING]}),
        (CHATML, {"messages": [QUESTION, {"role": "assistant", "content": "the tag <think> opens, </think> closes"}]}),
        (STRIPPING, {"messages": [QUESTION, ANSWER]}),
        (CHATML.replace("message['content']", "message['content'] | trim"), {"question": "q", "answer": "\n ab \n"}),
        (
            CHATML.replace("message['content']", "(message.reasoning_content | default('')) + message['content']"),
            {"messages": [QUESTION, ANSWER | {"reasoning_content": "Add."}]},
        ),
        # An empty answer that does not count is not in the way.
        (CHATML, {"messages": [QUESTION, EMPTY | {"weight": 0}, QUESTION, ANSWER]}),
        (CHATML, {"prompt": [QUESTION, EMPTY, QUESTION], "completion": [ANSWER]}),
        # Marks may leave reasoning out of what counts, as long as it is there.
        (
            MARKED.replace("{% generation %}", "{{ message.reasoning_content }}{% generation %}"),
            {"messages": [QUESTION, ANSWER | {"reasoning_content": "Add."}]},
        ),
    ],
)
def test_a_row_that_is_whole_is_used(template: str, row: dict[str, Any]) -> None:
    encoded = encode(make_tokenizer(template), row)
    assert not encoded.unusable and encoded.num_targets > 1


def test_earlier_answers_without_their_reasoning_do_not_count() -> None:
    marked = MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endg",
        "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}{{ '<|im_end|>' }}{% endg",
    )
    tokenizer = make_tokenizer(marked)
    row = encode(tokenizer, {"messages": [QUESTION, THINKING, QUESTION, ANSWER, QUESTION, THINKING]})
    assert row.notes == Note.NO_REASONING and not row.unusable
    text = text_of(tokenizer, row)
    assert text.count("[[") == 2 and f"\n[[ab{END}]]" in text and text.endswith(f"[[{THINKING['content']}{END}]]\n")


def test_messages_that_the_template_leaves_out_are_noted() -> None:
    system = {"role": "system", "content": "Be short."}
    row = {"messages": [system, QUESTION, ANSWER]}
    without = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    as_json = CHATML.replace("message['content']", "(message['content'] | tojson)", 1)
    for template, note in ((CHATML, Note(0)), (without, Note.CONTEXT_LOST), (MARKED, Note(0))):
        assert encode(make_tokenizer(template), row).notes == note
    quoted = {"messages": [QUESTION | {"content": 'say "q"\nand "r"'}, ANSWER]}
    assert encode(make_tokenizer(as_json), quoted).notes == Note(0)


@pytest.mark.parametrize("template", [ENDING_LATE, MARKED_BUT_ITS_END])
def test_a_template_that_never_trains_a_stop_token_is_refused(template: str) -> None:
    for row in ({"messages": [QUESTION, ANSWER]}, {"messages": [QUESTION, ANSWER, QUESTION, ANSWER]}):
        with pytest.raises(
            LoptError, match="ends no answer with a token that the model could .* --allow_no_stop_token"
        ):
            RowEncoder(make_tokenizer(template))(row)
        allowed = encode(make_tokenizer(template), row, allow_no_stop_token=True)
        assert allowed.num_targets >= 1 and not allowed.unusable
    assert encode(make_tokenizer(template), {"text": "ab"}).num_targets == 2, "no template is needed"


def with_special_tokens(single: str, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(template)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(BOS, 0), (END, 2)]
    )
    return tokenizer


@pytest.mark.parametrize("single", [f"{BOS} $A", f"{BOS} $A {END}", f"$A {END}", "$A"])
def test_special_tokens_open_a_text_once_and_end_it_once(single: str) -> None:
    tokenizer = with_special_tokens(single)
    opening = BOS if BOS in single else ""
    for row, text in (
        ({"prompt": "q", "completion": "ab"}, f"{opening}q[[ab{END}]]"),
        ({"prompt": f"{BOS}q", "completion": f"ab{END}"}, f"{BOS}q[[ab{END}]]"),
        ({"prompt": "", "completion": "ab"}, f"{opening}[[ab{END}]]"),
        ({"text": "ab"}, f"[[{opening}ab{END}]]"),
        ({"text": f"{BOS}ab{END}"}, f"[[{BOS}ab{END}]]"),
    ):
        assert text_of(tokenizer, encode(tokenizer, row)) == text, row


def test_what_a_template_makes_is_not_opened_or_ended_once_more() -> None:
    tokenizer = with_special_tokens(f"{BOS} $A {END}", "<s>" + CHATML)
    text = text_of(tokenizer, encode(tokenizer, {"messages": [QUESTION, ANSWER]}))
    assert text == f"{BOS}{START}user\nq{END}\n{START}assistant\n[[ab{END}\n]]"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [
        '{"question": "q", "answer": "ab", "id": 1, "source": "x"}',
        '{"question": "q", "answer": "", "id": 2, "source": "x"}',
        '{"question": "q", "answer": "</think>ab", "id": 3, "source": "x"}',
        '{"question": "q", "answer": "<think>so</think>ab", "id": 4, "source": "x"}',
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_the_line_before_training_says_it(files: Path, streaming: bool) -> None:
    config = DataConfig(train_file=[str(files / "train.jsonl")], streaming=streaming)
    said = load_rows(config, make_tokenizer(STRIPPING)).summary()
    assert "2 used, 2 left out (" in said
    assert "1 with an empty answer" in said and "1 whose reasoning the chat template leaves out" in said
    assert said.endswith("; columns id, source are not used")


def test_the_flag_reaches_the_rows(files: Path) -> None:
    (files / "train.jsonl").write_text('{"question": "q", "answer": "ab"}\n')
    for streaming in (False, True):
        given: dict[str, Any] = {"train_file": [str(files / "train.jsonl")], "streaming": streaming}
        with pytest.raises(LoptError, match=r"row 1 of .*train\.jsonl: the chat template ends no answer"):
            load_rows(DataConfig(**given), make_tokenizer(ENDING_LATE))
        rows = load_rows(DataConfig(**given, allow_no_stop_token=True), make_tokenizer(ENDING_LATE))
        assert len(rows) == 1
    (files / "train.jsonl").write_text('{"question": "q", "answer": ""}\n')
    with pytest.raises(LoptError, match=r"none of the 1 rows .* \(1 with an empty answer\); docs/data.md says what"):
        load_rows(DataConfig(train_file=[str(files / "train.jsonl")]), make_tokenizer(CHATML))

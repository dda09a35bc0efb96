"""The same tokens count as with TRL, by each of its flags; by `assistant_only_loss` with all of its chat templates."""

from datetime import datetime
from typing import Any

import pytest
from chat import MARKED, make_tokenizer
from trl_templates import NAMES, decoded, prepared_by_trl, source, tokenizer_for, trained_by_trl

from lopt_pp.config.truncation import Truncation
from lopt_pp.data.encoding import EncodedRow, Note, RowEncoder
from lopt_pp.errors import LoptError
from lopt_pp.util.compat_transformers import templates_see


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": CITY}}]
RESULT = {"role": "tool", "name": "weather", "content": "sunny", "tool_call_id": "abcdefghi"}
ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user("hi"), assistant("hello there")]},
    "system": {"messages": [{"role": "system", "content": "Be short."}, user("hi"), assistant("hello there")]},
    "turns": {"messages": [user("a"), assistant("one"), user("b"), assistant("two"), user("c"), assistant("three")]},
    "tools": {
        "messages": [user("weather?"), assistant("", tool_calls=[CALL]), RESULT, assistant("Sunny."), user("ta")]
        + [assistant("Welcome.")],
        "tools": TOOLS,
    },
    "reasoning": {"messages": [user("2+2?"), assistant("4", reasoning_content="Add.")]},
    "inline": {"messages": [user("2+2?"), assistant("<think>\nAdd.\n</think>\n\n4")]},
    "turns with reasoning": {
        "messages": [user("2+2?"), assistant("4", reasoning_content="Add."), user("3+3?")]
        + [assistant("6", reasoning_content="Sum.")]
    },
    "completion": {"prompt": [user("hi")], "completion": [assistant("hello there")]},
}

# Where the two differ. TRL trains on answers without the reasoning or the tool call that the row has.
LEFT_OUT = {
    "reasoning": "cohere cohere2 deepseek_r1_distill deepseekv3 gemma gemma3 idefics3 lfm2 lfm2_v2 llama3 llava_next "
    "phi3 phi3_5 qwen2_5 qwen2_5_vl qwen3_instruct_2507 qwen3_vl smolvlm",
    "inline": "deepseekv3",
    "tools": "deepseek_r1_distill idefics3 lfm2 llama3 phi3 phi3_5 qwen2_5_vl smolvlm",
}
LEFT_OUT["turns with reasoning"] = LEFT_OUT["reasoning"]
# Of these, the answers whose reasoning is dropped once the conversation goes on do not count.
EARLIER_DO_NOT_COUNT = (
    "diffusion_gemma glm4moe gptoss lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl nemotron_3_5_lightning nemotron_3_nano "
    "nemotron_3_super nemotron_3_ultra"
)
# What this template puts behind the end of an answer counts too, as in all that follows a prompt.
COUNTS_MORE = {"completion": "llava_next"}
# TRL has no copy of these with marks.
NOT_OF_TRL = "gemma4 gemma4_v2 gemma4_v3 gemma4_v4 gemma4_v5 llama3_1 llama3_2"


def encode(encoder: RowEncoder, row: dict[str, Any]) -> EncodedRow | None:
    """None of a row that the template refuses."""
    try:
        return encoder(row)
    except LoptError as error:
        assert "the chat template refuses" in str(error)
        return None


@pytest.mark.parametrize("name", NAMES)
@templates_see(datetime(2026, 1, 2))  # Some print the date.
def test_the_same_counts(name: str) -> None:
    tokenizer = tokenizer_for(source(name))
    encoder = RowEncoder(tokenizer)
    for kind, row in ROWS.items():
        got = encode(encoder, row)
        try:
            wanted = trained_by_trl(tokenizer, row, name)
        except Exception as error:
            if "not training-compatible" in str(error):
                assert name in NOT_OF_TRL.split()
                if kind not in ("tools", "reasoning", "turns with reasoning"):
                    assert got is not None and not got.unusable and got.num_targets > 5
            else:
                assert got is None, f"{name}, {kind}: TRL's template refuses it: {error}"
            continue
        assert got is not None, f"{name}, {kind}: refused"
        if name in LEFT_OUT.get(kind, "").split():
            assert got.unusable.endswith("the chat template leaves out") and got.input_ids == []
            continue
        shown, expected = decoded(tokenizer, got), decoded(tokenizer, wanted)
        if name in EARLIER_DO_NOT_COUNT.split() and kind == "turns with reasoning":
            before, _, last = expected.partition("3+3?")
            expected = before.replace("[[", "").replace("]]", "") + "3+3?" + last
        if name in COUNTS_MORE.get(kind, "").split():
            assert shown != expected
            shown, expected = shown.replace("]]", ""), expected.replace("]]", "")
        assert shown == expected, f"{name}, {kind}: another text counts"
        assert got.input_ids == wanted.input_ids


def test_glm_trains_the_token_that_ends_a_turn() -> None:
    tokenizer = tokenizer_for(source("glm4moe"))
    row = RowEncoder(tokenizer)({"question": "q", "answer": "a"})
    assert row is not None
    assert decoded(tokenizer, row) == "[gMASK]<sop><|user|>\nq<|assistant|>[[\n<think></think>\na<|user|>]]"


def test_reasoning_is_trained_where_trl_has_a_template_that_keeps_it() -> None:
    tokenizer = tokenizer_for(source("deepseek_r1_distill"))
    for row in (ROWS["inline"], {"prompt": "2+2?", "completion": "<think>\nAdd.\n</think>\n\n4"}):
        encoded = RowEncoder(tokenizer)(row)
        assert encoded is not None
        assert "Add.\n</think>\n\n4<｜end▁of▁sentence｜>]]" in decoded(tokenizer, encoded)


OF_EACH_KIND: dict[str, dict[str, Any]] = {
    "text": {"text": "abc"},
    "prompt and completion": {"prompt": "q", "completion": "ab"},
    "conversation": {"messages": [user("q"), assistant("ab"), user("r"), assistant("abc")]},
    "completion of messages": {
        "prompt": [user("q"), assistant("ab"), user("r")],
        "completion": [assistant("abc"), user("s"), assistant("x")],
    },
    "tokens": {"input_ids": [3, 4, 5, 6]},
    "tokens of a completion": {"input_ids": [3, 4, 5, 6], "completion_mask": [0, 0, 1, 1]},
    "tokens of a conversation": {"input_ids": [3, 4, 5, 6], "assistant_masks": [0, 1, 0, 1]},
    "tokens with both masks": {
        "input_ids": [3, 4, 5, 6],
        "completion_mask": [0, 0, 1, 1],
        "assistant_masks": [0, 1, 0, 1],
    },
    "tokens with labels": {"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, -100]},
}


@pytest.mark.parametrize("kind", OF_EACH_KIND)
def test_what_is_given_means_what_it_means_in_trl(kind: str) -> None:
    row = OF_EACH_KIND[kind]
    # TRL gives a prompt and its completion as strings to no template.
    tokenizer = make_tokenizer(None if kind == "prompt and completion" else MARKED)
    for completion_only in (True, False):
        for assistant_only in (None, True, False):
            if assistant_only is None and "messages" in row:
                continue  # By default, the assistant's turns count here.
            given = {"completion_only_loss": completion_only, "assistant_only_loss": bool(assistant_only)}
            flags: dict[str, Any] = given | {"assistant_only_loss": assistant_only}
            encode = RowEncoder(tokenizer, **flags)
            try:
                wanted = prepared_by_trl(tokenizer, row, **given)
            except ValueError:
                # Here it is refused only where every token would count in silence.
                if kind in ("text", "tokens", "tokens of a completion"):
                    with pytest.raises(LoptError, match="no turns of an assistant, and --assistant_only_loss is given"):
                        encode(row)
                else:
                    assert encode(row) is not None
                continue
            got = encode(row)
            assert got is not None and got.input_ids == wanted.input_ids, flags
            assert got.labels == wanted.labels, flags


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_row_is_cut_as_by_trl(mode: Any) -> None:
    row = OF_EACH_KIND["prompt and completion"]
    tokenizer = make_tokenizer()
    whole = RowEncoder(tokenizer)(row)
    assert whole is not None
    for max_length in range(3, len(whole.input_ids) + 2):
        got = RowEncoder(tokenizer, truncation=Truncation(max_length, mode))(row)
        assert got is not None and bool(got.notes & Note.TRUNCATED) == (max_length < len(whole.input_ids))
        try:
            wanted = prepared_by_trl(tokenizer, row, max_length=max_length, truncation_mode=mode)
        except IndexError:  # Nothing of it counts, and TRL leaves it out.
            assert got.num_targets == 0
            continue
        assert (got.input_ids, got.labels) == (wanted.input_ids, wanted.labels)


def test_what_is_not_given_counts_on_answers() -> None:
    encode = RowEncoder(make_tokenizer(MARKED))
    counted = {kind: encode(row) for kind, row in OF_EACH_KIND.items()}
    texts = {kind: decoded(make_tokenizer(), row).replace(" ", "") for kind, row in counted.items() if row is not None}
    assert texts["conversation"].count("[[") == 2
    assert texts["completion of messages"].count("[[") == 2
    assert [row.labels for kind, row in counted.items() if row is not None and kind.startswith("tokens")] == [
        [3, 4, 5, 6],
        [-100, -100, 5, 6],
        [-100, 4, -100, 6],
        [-100, -100, -100, 6],
        [-100, 4, 5, -100],
    ]

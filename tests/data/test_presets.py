"""Presets, and functions of the user's own."""

import sys
from pathlib import Path
from typing import Any

import pytest
from chat import ANSWER, CHATML, END, QUESTION, START, make_tokenizer, spell

from lopt_pp.data import DataConfig
from lopt_pp.data.encoding import RowEncoder
from lopt_pp.data.formats import Conversation, Pair
from lopt_pp.data.loading import with_chat_template
from lopt_pp.data.presets import PRESETS, find_reader
from lopt_pp.errors import LoptError

MODULE = """\
def swap(row):
    return {"prompt": row["b"], "completion": row["a"]}

def some(row):
    return None if row["a"] == "no" else {"text": row["a"]}

def bad(row):
    return row["missing"]

def wrong(row):
    return 3

number = 5
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, where a user has it."""
    monkeypatch.delitem(sys.modules, "own_mapping", raising=False)
    (tmp_path / "own_mapping.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_mapping"


def read(mapping: str, row: dict[str, Any]) -> object:
    return find_reader(mapping, "text")[0](row)


def test_own_function(module: str) -> None:
    assert read(f"{module}:swap", {"a": "x", "b": "y"}) == Pair("y", "x", "y")
    assert read(f"{module}:some", {"a": "no"}) is None


@pytest.mark.parametrize(
    ("mapping", "error"),
    [
        (
            "metamath",
            "^--dataset_mapping metamath: give one of metamathqa, alpaca, tulu3, gsm8k, or a function of yours",
        ),
        (
            "nowhere:swap",
            "^--dataset_mapping nowhere:swap: nowhere cannot be imported: ModuleNotFoundError: No module named",
        ),
        ("own_mapping:gone", "^--dataset_mapping own_mapping:gone: own_mapping has no gone$"),
        ("own_mapping:number", "^--dataset_mapping own_mapping:number is not a function, but 5"),
        ("own_mapping:bad", "^--dataset_mapping own_mapping:bad fails: KeyError: 'missing'"),
        ("own_mapping:wrong", "^--dataset_mapping own_mapping:wrong returns int; let it return a dict, or None"),
    ],
)
def test_unusable_function(module: str, mapping: str, error: str) -> None:
    with pytest.raises(LoptError, match=error):
        read(mapping, {"a": "x"})


def test_the_version_is_that_of_the_users_code(module: str, tmp_path: Path) -> None:
    before = find_reader(f"{module}:swap", "text")[1]
    (tmp_path / "own_mapping.py").write_text(MODULE + "\n# changed\n")
    assert find_reader(f"{module}:swap", "text")[1] != before


def test_presets_have_their_columns_and_prompts() -> None:
    pair = read("metamathqa", {"query": "q", "response": "ab", "type": "t", "original_question": "o"})
    assert isinstance(pair, Pair) and (pair.prompt, pair.completion) == ("q", "ab")
    assert pair.plain.endswith("### Instruction:\nq\n\n### Response:")
    pair = read("alpaca", {"instruction": "q", "input": "i", "output": "ab", "text": "no"})
    assert isinstance(pair, Pair) and (pair.prompt, pair.completion) == ("q\n\ni", "ab")
    assert pair.plain.endswith("### Instruction:\nq\n\n### Input:\ni\n\n### Response:")
    assert read("alpaca", {"instruction": "q", "input": "", "output": "ab"}) == read(
        "metamathqa", {"query": "q", "response": "ab"}
    )
    assert read("tulu3", {"id": "1", "messages": [QUESTION, ANSWER], "source": "s"}) == Conversation([QUESTION, ANSWER])
    assert read("gsm8k", {"question": "q", "answer": "ab"}) == Pair("q", "ab", "Question: q\nAnswer: ")
    with pytest.raises(LoptError, match=r"it has no string `response` \(it has: query\)"):
        read("metamathqa", {"query": "q"})


def test_a_preset_gives_a_tokenizer_the_prompt_it_needs() -> None:
    reader, _ = find_reader("metamathqa", "text")
    row = {"query": "q", "response": "ab"}
    chat, plain = make_tokenizer(CHATML), make_tokenizer()
    encoded = RowEncoder(chat, reader)(row)
    assert encoded is not None
    assert chat.convert_ids_to_tokens(encoded.input_ids)[:8] == spell((START, "user\nq", END))
    encoded = RowEncoder(plain, reader)(row)
    assert encoded is not None
    tokens = plain.convert_ids_to_tokens(encoded.input_ids)
    assert "".join(tokens).startswith("<s>Below is an instruction") and tokens[-2:] == ["ab", END]


def test_tulu_3_brings_its_template() -> None:
    config = DataConfig(train_file=["rows.jsonl"], dataset_mapping="tulu3")
    tokenizer = with_chat_template(make_tokenizer(), config)
    encoded = RowEncoder(tokenizer, find_reader("tulu3", "text")[0])({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]})
    assert encoded is not None
    text = f"<|user|>\nq\n<|assistant|>\nab{END}\n<|user|>\nq\n<|assistant|>\nab{END}"
    assert "".join(tokenizer.convert_ids_to_tokens(encoded.input_ids)) == text
    counted = [label for label in encoded.labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(counted) == ["ab", END, "ab", END]
    assert with_chat_template(make_tokenizer(CHATML), config).chat_template == CHATML


def test_a_preset_knows_its_dataset() -> None:
    config = DataConfig(dataset_mapping="gsm8k")
    assert (config.dataset_name, config.dataset_config) == ("openai/gsm8k", "main")
    assert DataConfig(dataset_mapping="gsm8k", train_file=["rows.jsonl"]).dataset_name is None
    assert all(DataConfig(dataset_mapping=name).dataset_name for name in PRESETS)

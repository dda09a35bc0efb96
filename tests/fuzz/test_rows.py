"""Rows and files of rows of every shape and none: tokens and labels that can be trained on, or a clear error."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from byte_tokenizer import TEMPLATES, outcome, tokenizer
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import JUNK, contents, documents, share

from lopt_pp.data import IGNORE_INDEX, DataConfig, RowEncoder, TokenizedRows, load_rows
from lopt_pp.errors import LoptError

MESSAGES = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that."}]
FORMATS: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"messages": MESSAGES},
    {"messages": [*MESSAGES, *MESSAGES]},
    {"prompt": "a", "completion": "b"},
    {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    {"question": "a?", "answer": "b"},
    {"instruction": "do", "input": "this", "output": "done"},
    {"text": "once upon"},
]

COLUMNS = sorted({column for shape in FORMATS for column in shape})
EXTRA = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}], "name": "x"}
ROWS = (
    st.sampled_from(FORMATS).flatmap(documents)
    | st.sampled_from(FORMATS).flatmap(lambda row: documents(row | EXTRA))
    | st.just({"messages": [message | EXTRA for message in MESSAGES]}).flatmap(documents)
    | st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=8), JUNK, max_size=4)
)


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@given(st.sampled_from(sorted(TEMPLATES)), ROWS)
@example("plain", {"text": "\ud800"})
@example("none", {"input_ids": [10**4000], "labels": [1]})
@example("marked", {"messages": [MESSAGES[0], {"role": "assistant", "content": "\ud800"}]})
@example("careless", {"messages": [MESSAGES[0], MESSAGES[1] | {"tool_calls": 1}]})
def test_rows(template: str, row: dict[str, Any]) -> None:
    try:
        encoded = RowEncoder(tokenizer(TEMPLATES[template]))(row)
    except LoptError as error:
        assert 0 < len(str(error)) < 1000 + sum(map(len, row))
        return
    assert encoded is not None, "none is left out without a mapping"
    vocabulary = len(tokenizer(None))
    assert len(encoded.input_ids) == len(encoded.labels)
    assert all(type(token) is int and 0 <= token < vocabulary for token in encoded.input_ids)
    assert all(label == IGNORE_INDEX or 0 <= label < vocabulary for label in encoded.labels)
    filled = {column: value for column, value in row.items() if value is not None}
    if {"input_ids", "labels"} <= filled.keys():
        assert (encoded.input_ids, encoded.labels) == (row["input_ids"], row["labels"])
        return
    targets = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    if "text" in filled and len(filled) == 1:
        assert targets == encoded.input_ids
    if template == "none" and filled.keys() == {"question", "answer"}:
        # What is learned is the answer, all of it and nothing else.
        assert tokenizer(None).decode(targets) == row["answer"].removesuffix("<end>") + "<end>"


def test_a_row_that_lies_deeper_in_itself_than_any_stack_is() -> None:
    for column in ("text", "input_ids", "messages"):
        with pytest.raises(LoptError, match=f"{column}.* (string|integers|role)") as refused:
            RowEncoder(tokenizer(TEMPLATES["plain"]))({column: deep(100_000), "labels": [1]})
        assert len(str(refused.value)) < 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def load(folder: Path, name: str, content: bytes) -> None:
    """Loads a file: its rows can be read and are within bounds, or the error names it, streamed or not."""
    path = folder / name
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        try:
            assert outcome(path, TEMPLATES["plain"], True) == outcome(path, TEMPLATES["plain"], False)
            rows = load_rows(DataConfig(train_file=[str(path)]), tokenizer(TEMPLATES["plain"]))
        except LoptError as error:
            assert name in str(error) and len(str(error)) < 2000
            return
    assert isinstance(rows, TokenizedRows) and len(rows) > 0
    for index in range(len(rows)):
        row = rows[index]
        assert 2 <= len(row.input_ids) == len(row.labels) == rows.lengths[index] <= 1024
        assert rows.num_targets[index] == sum(label != IGNORE_INDEX for label in row.labels[1:]) > 0


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(row if isinstance(row, list) else [row] for row in rows)
    return text.getvalue().encode(errors="replace")


SOME_ROWS = st.lists(ROWS | JUNK, min_size=1, max_size=3)
WHOLE = lines(FORMATS[3:4] * 3)


@share(10)
@given(SOME_ROWS.map(lines) | contents(WHOLE))
@example(b"{}\n{}\n")
@example(b"[[[[[")
@example(b"[" * 100_000)
@example(b'{"text": "a"}\n{"text": ["b"]}\n')
@example(b'{"text": "\\ud800"}\n')
@example(b'{"input_ids": [99999999999999999999], "labels": [1]}\n')
def test_files_of_lines(folder: Path, content: bytes) -> None:
    load(folder, "rows.jsonl", content)


@share(20)
@given(SOME_ROWS.map(lambda rows: json.dumps(rows).encode()))
@example(b"[]")
@example(b"{}")
@example(b"1")
def test_files_of_json(folder: Path, content: bytes) -> None:
    load(folder, "rows.json", content)


@share(10)
@given(
    st.lists(st.lists(JUNK, max_size=3), max_size=3).map(lambda rows: table([["question", "answer"], *rows]))
    | st.lists(st.lists(st.text(max_size=5), max_size=3), max_size=3).map(table)
    | contents(table([["question", "answer"], ["a", "b"], ["c", 'd"\n']]))
)
@example(b"text,text\na,b\n")
@example(b"\n\n\n")
@example(b"question,answer\na\n")
@example(b"question\na,b,c\n")
@example(b'question,answer\n"a,b\n')
@example(b"text\n\xff\n")
def test_tables(folder: Path, content: bytes) -> None:
    load(folder, "rows.csv", content)

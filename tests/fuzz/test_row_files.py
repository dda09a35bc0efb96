"""Rows mean the same in every format of file, streamed or not: equal tokens and labels, or equal errors.

HYPOTHESIS_PROFILE=long nice pytest tests/fuzz/test_row_files.py      10,000 sets of rows, other ones every time
"""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from byte_tokenizer import TEMPLATES, outcome
from hypothesis import example, given, settings
from hypothesis import strategies as st

Rows = list[dict[str, Any]]

CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ALL_TEMPLATES = {name: TEMPLATES[name] for name in ("none", "plain", "marked", "rewriting")} | {
    name: (CHAT_TEMPLATES / f"{name}.jinja").read_text() for name in ("qwen3", "llama3_1", "qwen2_5_training")
}

# What a reader that guesses would take for something else than text.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    ["2024-01-01", "2024-01-01T00:00:00Z", "12:30", "007", "1e5", "nan", "None", "null", "true", "[1]", '{"a": 1}', " "]
)
FILLED = TEXTS.filter(bool)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
    max_leaves=4,
)

NAMES = st.sampled_from(["look", "run"])
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "when", "n"]), VALUES, max_size=2)
CALLS = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    NAMES,
    ARGUMENTS | ARGUMENTS.map(json.dumps),
)
CONTENTS = FILLED | FILLED | st.lists(FILLED.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)
ASK = st.fixed_dictionaries({"role": st.just("user"), "content": CONTENTS})
REPLY = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": CONTENTS}, optional={"reasoning_content": TEXTS, "weight": st.just(1)}
)
CALL = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": st.lists(CALLS, min_size=1, max_size=2)},
    optional={"content": TEXTS | st.none()},
)
RESULT = st.fixed_dictionaries({"role": st.just("tool"), "content": FILLED}, optional={"name": NAMES})
ODD = st.fixed_dictionaries({"role": TEXTS | st.just("user"), "content": VALUES}) | VALUES
EXCHANGE = st.tuples(ASK, REPLY) | st.tuples(ASK, CALL, RESULT, REPLY)
TURNS = st.builds(
    lambda system, exchanges, odd: [*system, *(turn for exchange in exchanges for turn in exchange), *odd],
    st.sampled_from([[], [], [{"role": "system", "content": "be brief"}]]),
    st.lists(EXCHANGE, min_size=1, max_size=2),
    st.integers(0, 9).flatmap(lambda number: st.lists(ODD, min_size=1, max_size=1) if number == 9 else st.just([])),
)
TOOLS = st.lists(
    st.builds(
        lambda name, properties: {
            "type": "function",
            "function": {
                "name": name,
                "description": "does it",
                "parameters": {"type": "object", "properties": properties, "required": list(properties)},
            },
        },
        NAMES,
        st.dictionaries(
            st.sampled_from(["city", "when", "n"]),
            st.fixed_dictionaries({"type": st.sampled_from(["string", "integer"])}, optional={"enum": st.lists(TEXTS)}),
            max_size=2,
        ),
    ),
    min_size=1,
    max_size=2,
)
ROWS_OF_MESSAGES = st.fixed_dictionaries(
    {"messages": TURNS},
    optional={"tools": TOOLS | TOOLS.map(json.dumps), "chat_template_kwargs": st.just({"enable_thinking": True})},
)
ROWS_OF_TEXT = (
    st.fixed_dictionaries({"question": FILLED, "answer": FILLED})
    | st.fixed_dictionaries({"prompt": FILLED, "completion": FILLED})
    | st.fixed_dictionaries({"instruction": FILLED, "output": FILLED}, optional={"input": FILLED})
    | st.fixed_dictionaries({"text": FILLED})
)
ROWS_OF_TOKENS = st.lists(st.integers(0, 255), max_size=4).map(lambda ids: {"input_ids": ids, "labels": ids})
ROWS_OF_SHAREGPT = st.lists(st.tuples(FILLED, FILLED), min_size=1, max_size=2).map(
    lambda pairs: {
        "conversations": [
            {"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
    }
)


def with_more(rows: st.SearchStrategy[dict[str, Any]], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Rows with columns that nothing knows, or in place of others."""
    names = st.sampled_from(["id", "date", "source", "text", "system", "history"])
    return rows | st.builds(lambda row, more: row | more, rows, st.dictionaries(names, values, max_size=2))


OF_TEXT = with_more(ROWS_OF_TEXT, FILLED | st.none())
OF_ALL = with_more(ROWS_OF_MESSAGES | ROWS_OF_TEXT | ROWS_OF_TOKENS | ROWS_OF_SHAREGPT, VALUES)
OF_MESSAGES = with_more(ROWS_OF_MESSAGES, VALUES)
SETS: st.SearchStrategy[Rows] = st.sampled_from([OF_TEXT, ROWS_OF_MESSAGES, OF_MESSAGES, OF_ALL]).flatmap(
    lambda rows: st.lists(rows, min_size=1, max_size=3)
)


def as_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes | None:
    """None of rows that CSV does not hold: it has nothing but text, and an empty text is an absent one there."""
    if any(value is not None and not (value and isinstance(value, str)) for row in rows for value in row.values()):
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_table(rows: Rows) -> pa.Table | None:
    """None of rows that a table does not hold: it has one type for each column and one order of keys, integers of 64
    bits, and no objects without a key. What it gives back is the rows, but for nulls that stand for what is absent.
    """
    try:
        table = pa.Table.from_pylist(rows, pa.schema([(name, type_of(rows, name)) for name in names_of(rows)]))
        pq.write_table(table, io.BytesIO())
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None
    return (
        table
        if table.num_columns and json.dumps(without_nulls(table.to_pylist())) == json.dumps(without_nulls(rows))
        else None
    )


def names_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def type_of(rows: Rows, name: str) -> pa.DataType:
    return pa.array([row.get(name) for row in rows]).type


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def as_parquet(rows: Rows) -> bytes | None:
    if (table := as_table(rows)) is None:
        return None
    pq.write_table(table, content := io.BytesIO())
    return content.getvalue()


def as_arrow(rows: Rows) -> bytes | None:
    if (table := as_table(rows)) is None:
        return None
    with pa.ipc.new_stream(content := io.BytesIO(), table.schema) as stream:
        stream.write_table(table)
    return content.getvalue()


FORMATS: dict[str, Callable[[Rows], bytes | None]] = {
    "jsonl": as_lines,
    "json": lambda rows: json.dumps(rows, ensure_ascii=False, indent=1).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
    "arrow": as_arrow,
    "jsonl.gz": lambda rows: gzip.compress(as_lines(rows), 1, mtime=0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.mark.slow
@settings(max_examples=10_000 if settings.get_current_profile_name() == "long" else 50)
@given(st.sampled_from(sorted(ALL_TEMPLATES)), SETS, st.sampled_from(sorted(FORMATS)))
@example("plain", [{"text": "2024-01-01"}, {"text": "12:30"}], "parquet")
@example("none", [{"question": "1", "answer": "007"}, {"text": "nan"}], "csv")
def test_a_row_means_the_same_in_every_format(folder: Path, template: str, rows: Rows, both_ways: str) -> None:
    compare(folder, ALL_TEMPLATES[template], rows, both_ways)


def compare(folder: Path, template: str | None, rows: Rows, both_ways: str) -> None:
    """Reads the rows from all formats, of which one more than JSONL is also tokenized before."""
    outcomes: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        for suffix, make in FORMATS.items():
            if (content := make(rows)) is None:
                continue
            path = folder / f"rows.{suffix}"
            path.write_bytes(content)
            for streaming in (False, True) if suffix in ("jsonl", both_ways) else (True,):
                outcomes[f"{suffix}, streamed" if streaming else suffix] = outcome(path, template, streaming)
    expected = outcomes["jsonl"]
    others = {name: other for name, other in outcomes.items() if other != expected}
    assert not others, (expected, others)

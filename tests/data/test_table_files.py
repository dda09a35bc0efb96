"""Rows of Parquet and Arrow files: as typed there, or refused in one line."""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopt_pp.data import DataConfig
from lopt_pp.data.sources import read_rows
from lopt_pp.errors import LoptError

ROWS: list[dict[str, Any]] = [{"text": f"row {number}", "more": [number, {}]} for number in range(2500)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(*paths: Path) -> list[dict[str, Any]]:
    raw = read_rows(DataConfig(train_file=list(map(str, paths))))
    return [raw[index] for index in range(len(raw))]


def as_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, row_group_size=700)


def as_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=700)


def as_file(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as file:
        file.write_table(table, max_chunksize=700)


KINDS = pytest.mark.parametrize(
    ("write", "suffix"), [(as_parquet, "parquet"), (as_stream, "arrow"), (as_file, "arrow")]
)


@KINDS
def test_values_are_those_of_the_table(tmp_path: Path, write: Callable[[pa.Table, Path], None], suffix: str) -> None:
    row = {"text": "2024-01-01", "day": datetime.date(2024, 1, 1), "keys": {"a": None}, "bytes": b"x", "none": None}
    table = pa.Table.from_pylist([row, {"text": None}])
    write(table, tmp_path / f"a.{suffix}")
    table = pa.table(
        {"text": pa.array(["x", "y", "x"]).dictionary_encode(), "long": pa.array(["z"] * 3, pa.large_string())}
    )
    write(table, tmp_path / f"b.{suffix}")
    absent = dict.fromkeys(("text", "day", "keys", "bytes", "none"))
    assert rows(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}") == [
        row,
        absent,
        *({"text": text, "long": "z"} for text in "xyx"),
    ]


@KINDS
def test_damaged(tmp_path: Path, write: Callable[[pa.Table, Path], None], suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    write(pa.table({"text": [row["text"] for row in ROWS]}), path)
    content = path.read_bytes()
    assert [row["text"] for row in rows(path)] == [row["text"] for row in ROWS]
    for damaged in (content[:10], content[: len(content) // 2], content[:-20], b"one", b"\0" * 1000):
        path.write_bytes(damaged)
        try:
            assert [row["text"] for row in rows(path)] == [row["text"] for row in ROWS], "only its end is missing"
        except LoptError as error:
            assert str(error).startswith(f"--train_file {path} cannot be read: ")
            assert str(error).endswith(f"; give a valid {suffix} file")
    for place in range(0, len(content), 97):  # A byte that is another must not end the process.
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            rows(path)
        except LoptError as error:
            assert str(path) in str(error) or "the table cannot be read there: " in str(error)


def test_a_row_that_is_not_text_is_found_among_others(tmp_path: Path) -> None:
    texts = pa.array([b"one", b"two", b"caf\xe9", b"four"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet")
    raw = read_rows(DataConfig(train_file=[str(tmp_path / "rows.parquet")]))
    read = raw.parts[0].read(range(4), range(1, 5))
    assert [next(read), next(read)] == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(LoptError, match="^the table cannot be read there: 'utf-8' codec can't decode"):
        next(read)


def test_no_rows(tmp_path: Path) -> None:
    as_parquet(pa.table({"text": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    with pytest.raises(LoptError, match="^--train_file .*rows.parquet has no rows; give data with a row or more"):
        rows(tmp_path / "rows.parquet")

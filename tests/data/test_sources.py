"""Which files and directories are read, as what, and how their rows are called."""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from lopt_pp.data import DataConfig
from lopt_pp.data.raw_rows import RawRows
from lopt_pp.data.sources import read_rows
from lopt_pp.errors import LoptError

ONE, TWO, THREE = ({"text": text} for text in ("one", "two", "three"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(*names: object, **flags: Any) -> RawRows:
    return read_rows(DataConfig(train_file=list(map(str, names)), **flags))


def rows(raw: RawRows) -> list[dict[str, Any]]:
    return [raw[index] for index in range(len(raw))]


@pytest.mark.parametrize("streaming", [False, True])
def test_several_files_patterns_and_directories(tmp_path: Path, streaming: bool) -> None:
    first, second = write(tmp_path / "b.jsonl", ONE), write(tmp_path / "a.jsonl", TWO, THREE)
    write(tmp_path / "folder" / "deep" / "c.jsonl", ONE)
    write(tmp_path / "folder" / "d.jsonl", TWO)
    (tmp_path / "folder" / "README.md").write_text("no rows")
    write(tmp_path / "folder" / ".ipynb_checkpoints" / "d-checkpoint.jsonl", THREE)
    write(tmp_path / "folder" / "._d.jsonl", THREE)
    assert rows(read(first, second, streaming=streaming)) == [ONE, TWO, THREE]
    assert rows(read(tmp_path / "*.jsonl", streaming=streaming)) == [TWO, THREE, ONE]
    assert rows(read(tmp_path / "folder", streaming=streaming)) == [TWO, ONE]
    raw = read(first, second, streaming=streaming)
    assert [raw.name(index) for index in range(3)] == [f"row 1 of {first}", f"row 1 of {second}", f"row 2 of {second}"]
    assert raw.source == f"{first}, {second} (2 files)"


@pytest.mark.parametrize(
    "name", ["train[1].jsonl", "data [v2].jsonl", "run[3]/train.jsonl", "a::b.jsonl", "a*.jsonl", "zip://a.jsonl", "-"]
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_that_is_there_is_not_a_pattern(tmp_path: Path, name: str, suffix: str) -> None:
    folder = tmp_path / "in"
    for decoy in ("train1", "data 2", "run3/train", "b", "ab"):
        write(folder / f"{decoy}.jsonl", TWO)
    path = (folder / name).with_suffix(f".{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[Path, dict[str, Any]], object]] = {
        "jsonl": write,
        "csv": as_csv,
        "parquet": as_parquet,
    }
    writers[suffix](path, ONE)
    assert rows(read(path)) == rows(read(path, streaming=True)) == [ONE]
    if path.parent != folder:
        assert rows(read(path.parent / f"*.{suffix}")) == [ONE], "of a pattern, a directory that is there is none"


def as_csv(path: Path, row: dict[str, Any]) -> None:
    path.write_text(f"text\n{row['text']}\n")


def as_parquet(path: Path, row: dict[str, Any]) -> None:
    pq.write_table(pa.Table.from_pylist([row]), path)


def test_a_file_that_is_given_twice_is_read_twice_and_said_so(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", ONE), write(tmp_path / "b.jsonl", TWO)
    raw = read(first, second, tmp_path / "." / "a.jsonl")
    assert rows(raw) == [ONE, TWO, ONE] and raw.source.endswith(" (3 files, a.jsonl 2 times)")


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(LoptError, match="rows.jsonl is a pipe or a device; write the rows to a file and give that"):
        read(tmp_path / "rows.jsonl")


def test_files_of_several_kinds_and_columns(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("text,more\nthree,x\n")
    Dataset.from_list([TWO]).to_parquet(tmp_path / "b.parquet")
    raw = read(write(tmp_path / "a.jsonl", {"prompt": "p"}), tmp_path / "b.parquet", tmp_path / "c.csv")
    assert rows(raw) == [{"prompt": "p"}, TWO, {"text": "three", "more": "x"}]


def test_a_column_may_hold_other_types_in_another_file_or_row(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = [{"text": "one"}, {"text": ["one"]}, {"text": 1, "more": {"a": None}}, {"text": 1.5}]
    assert rows(read(write(tmp_path / "a.jsonl", *given[:1]), write(tmp_path / "b.jsonl", *given[1:]))) == given


def test_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in (ONE, TWO))
    assert rows(read(path)) == rows(read(path, streaming=True)) == [ONE, TWO]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_has_saved(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_list([ONE, TWO]).save_to_disk(tmp_path / "one")
    splits = {"train": Dataset.from_list([THREE]), "test": Dataset.from_list([TWO])}
    DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert rows(read(tmp_path / "one", tmp_path / "several", streaming=streaming)) == [ONE, TWO, THREE]
    test = DataConfig(dataset_name=str(tmp_path / "several"), dataset_split="test", streaming=streaming)
    assert rows(read_rows(test)) == [TWO]
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert rows(read(arrow, streaming=streaming)) == [ONE, TWO]
    with pytest.raises(LoptError, match="has no split dev, but train, test"):
        read_rows(DataConfig(dataset_name=str(tmp_path / "several"), dataset_split="dev"))


def test_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n")
    with pytest.raises(LoptError, match="rows.jsonl has no rows; give data with a row or more"):
        len(read(path, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_directory_as_a_dataset(tmp_path: Path, streaming: bool) -> None:
    day, other, more = {"text": "2024-01-01"}, {"text": ["x"], "id": 1}, {"text": "7", "id": None}
    for name, given in (("train-0", [day, other]), ("train-1", [more]), ("test", [ONE, TWO, THREE])):
        write(tmp_path / "data" / f"{name}.jsonl", *given)

    def split(text: str) -> list[dict[str, Any]]:
        return rows(read_rows(DataConfig(dataset_name=str(tmp_path), dataset_split=text, streaming=streaming)))

    assert split("train") == [day, other, more]
    assert split("test[1:]+train[:1]") == [TWO, THREE, day]
    assert split("train[50%:]") == [more]
    assert split("all") == [day, other, more, ONE, TWO, THREE]
    raw = read_rows(DataConfig(dataset_name=str(tmp_path), dataset_split="test[1:]"))
    assert raw.name(1) == f"row 3 of {tmp_path}/data/test.jsonl"
    with pytest.raises(LoptError, match=r'--dataset_split dev cannot be loaded: Unknown split "dev"'):
        split("dev")
    time = (315532800, 315532800)
    for given in ([TWO], [ONE]):
        os.utime(write(tmp_path / "data" / "test.jsonl", *given), time)
        assert split("test") == given
    (tmp_path / "README.md").write_text(  # What it says itself is not a guess.
        "---\nconfigs:\n- config_name: default\n  data_files: data/test.jsonl\ndataset_info:\n  features:\n"
        "  - name: text\n    dtype: string\n---\n"
    )
    assert split("train") == [ONE]


def test_a_process_that_reads_some_rows_is_not_sent_the_places_of_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 100_000)
    raw = read(path)
    table = raw.table()
    assert table[[0, 99_999]] == {
        "part": [0, 0],
        "number": [0, 99_999],
        "start": [0, 1_599_984],
        "stop": [15, 1_599_999],
    }
    assert len(pickle.dumps((raw.parts, table.shard(8, 3)))) < 10_000

"""Files and data sets in, tokenized rows out; and what is said about those that cannot be used."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerFast
from word_rows import (
    EOS,
    EXPECTED,
    ONE,
    ROWS,
    SEVEN,
    SHORT,
    THREE,
    TWO,
    WORDS,
    load,
    make_tokenizer,
    pairs,
    write,
)

from lopt_pp.data import DataConfig, TokenizedRows, load_rows
from lopt_pp.data.files import find_files
from lopt_pp.errors import LoptError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_config_values() -> None:
    with pytest.raises(LoptError, match="exactly one of --train_file and --dataset_name; neither"):
        DataConfig()
    with pytest.raises(LoptError, match="exactly one of --train_file and --dataset_name; both"):
        DataConfig(train_file=["a.json"], dataset_name="b")
    with pytest.raises(LoptError, match="--max_length is 1; give at least 2"):
        DataConfig(train_file=["a.json"], max_length=1)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_file_types(suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / f"train{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif suffix == ".jsonl":
        write(path, ROWS)
    elif suffix == ".csv":
        pd.DataFrame(ROWS).to_csv(path, index=False)
    else:
        pd.DataFrame(ROWS).to_parquet(path)
    rows = load(path, tokenizer)
    assert pairs(rows) == EXPECTED
    assert rows.lengths.tolist() == [3, 3]
    assert rows.num_targets.tolist() == [2, 2]
    assert rows.summary() == f"2 rows of {path}: 2 used"


def test_dataset_directory(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS[1:])
    rows = load_rows(DataConfig(dataset_name=str(tmp_path), dataset_split="test"), tokenizer)
    assert isinstance(rows, TokenizedRows) and pairs(rows) == EXPECTED[1:]


def test_csv_cells_are_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "train.csv"
    path.write_text("question,answer,text\none,007,\n,,two\n")
    assert [ids for ids, _ in pairs(load(path, tokenizer))] == [[ONE, SEVEN, EOS], [TWO, EOS]]


def test_rows_of_several_shapes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = [{"text": "one two"}, *ROWS, {"input_ids": [TWO, THREE], "labels": [-100, THREE]}]
    expected = [([ONE, TWO, EOS], [ONE, TWO, EOS]), *EXPECTED, ([TWO, THREE], [-100, THREE])]
    assert pairs(load(write(tmp_path / "train.jsonl", rows), tokenizer)) == expected


def test_shape_that_first_appears_deep_in_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    padding = "x" * (1 << 20)
    rows = [*({"text": "one", "unused": padding} for _ in range(11)), *ROWS]
    assert pairs(load(write(tmp_path / "train.jsonl", rows), tokenizer))[-2:] == EXPECTED


def test_rows_left_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "one"},
        {"text": "one two three"},
        {"text": "one two"},
        {"input_ids": [ONE, TWO], "labels": [ONE, -100]},
        {"input_ids": [ONE], "labels": [ONE]},
        {"text": ""},
        {"text": "two one three"},
    ]
    loaded = load(write(tmp_path / "train.jsonl", rows), tokenizer, max_length=3)
    assert [ids for ids, _ in pairs(loaded)] == [[ONE, EOS], [ONE, TWO, EOS]]
    assert loaded.lengths.tolist() == [2, 3]
    assert loaded.num_targets.tolist() == [1, 2]
    assert loaded.dropped == {"longer than --max_length 3": 2, "without a target token": 3}
    assert loaded.summary() == (
        f"7 rows of {tmp_path}/train.jsonl: 2 used, 5 left out (2 longer than --max_length 3, 3 without a target token)"
    )


def test_no_row_left(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "one two three"}, {"text": ""}])
    with pytest.raises(
        LoptError,
        match=r"none of the 2 rows of .*train.jsonl can be used \(1 longer than --max_length 2, 1 without a target "
        r"token\); the shortest of the long ones has 4 tokens: raise --max_length; a target token is one of an answer",
    ):
        load(path, tokenizer, max_length=2)


@pytest.mark.parametrize(("mode", "other"), [("keep_start", ", or give --truncation_mode keep_end"), ("keep_end", "")])
def test_no_answer_left(mode: str, other: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    before, behind = ([-100] * 3, [TWO]) if mode == "keep_start" else ([TWO], [-100] * 3)
    row = {"input_ids": [TWO] * 4, "labels": [*before, *behind]}
    path = write(tmp_path / "train.jsonl", [row] * 2)
    with pytest.raises(LoptError, match=f"--truncation_mode has cut the answers away: raise --max_length{other}$"):
        load(path, tokenizer, max_length=2, truncation_mode=mode)


def test_malformed_row_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "train.jsonl", [*[{"text": "one"}] * 1500, {"foo": 1}])
    with pytest.raises(LoptError, match=r"^row 1501 of .*/train.jsonl: no usable columns \(it has: foo\); a row needs"):
        load(path, tokenizer)


def test_an_empty_name_is_not_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train.jsonl", [{"text": "one"}])
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in find_files(["."])] == ["train.jsonl"]
    with pytest.raises(LoptError, match="^--train_file '': expected the name of a file"):
        list(find_files([""]))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("missing.jsonl", None, "missing.jsonl does not exist"),
        ("", None, "is a directory without files that end in .json, .jsonl, .parquet, .csv, .arrow"),
        ("*.jsonl", None, "matches no file"),
        ("train.txt", "one", r"train.txt ends in none of .json, .jsonl, .parquet, .csv, .arrow"),
        ("empty.jsonl", "", "empty.jsonl is empty"),
        ("blank.jsonl", "\n\n", "blank.jsonl has no rows; give data with a row or more"),
        ("head.csv", "text\n", "head.csv has no rows; give data with a row or more"),
        ("bad.parquet", "one", "bad.parquet cannot be read: Parquet"),
    ],
)
def test_unreadable_file(
    name: str, content: str | None, error: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(LoptError, match=f"--train_file {tmp_path}.*{error}") as raised:
        load(path, tokenizer)
    assert "\n" not in str(raised.value)


def test_unreadable_dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "data"  # Without the cache, of which `datasets` would take files for data.
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    with pytest.raises(LoptError, match="--dataset_split dev cannot be loaded: Unknown split"):
        load_rows(DataConfig(dataset_name=str(folder), dataset_split="dev"), tokenizer)
    with pytest.raises(LoptError, match="--dataset_config main --dataset_split train cannot be loaded: .*not found"):
        load_rows(DataConfig(dataset_name=str(folder), dataset_config="main"), tokenizer)
    with pytest.raises(LoptError, match=f"--dataset_name {tmp_path}/no --dataset_split train cannot be loaded"):
        load_rows(DataConfig(dataset_name=f"{tmp_path}/no"), tokenizer)


def test_digest_is_of_the_used_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"input_ids": [ONE, TWO], "labels": [ONE, TWO]}
    other_label = {"input_ids": [ONE, TWO], "labels": [-100, TWO]}
    unused = {"input_ids": [ONE], "labels": [ONE]}
    longer = {"input_ids": [ONE, TWO, ONE, TWO], "labels": [ONE, TWO, ONE, TWO]}

    def digest(name: str, rows: list[dict[str, Any]]) -> str:
        return load(write(tmp_path / f"{name}.jsonl", rows), tokenizer).digest

    assert digest("a", [row, row, other_label]) == digest("b", [unused, row, row, other_label])
    different = [[row, row], [row, other_label], [other_label, row], [longer], [row]]
    assert len({digest(f"different{number}", rows) for number, rows in enumerate(different)}) == len(different)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_shows_progress(
    rank: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    datasets.enable_progress_bars()  # Commands turn them off, for good, where nobody looks.
    load(write(tmp_path / "train.jsonl", ROWS), tokenizer)
    assert ("Tokenizing" in capfd.readouterr().err) == (rank == "0")
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"dataset_num_proc": 0}, "^--dataset_num_proc 0: at least 1$"),
        ({"train_sampling_strategy": "group_by_length", "streaming": True}, "needs the lengths of all rows"),
        ({"train_sampling_strategy": "group_by_length", "shuffle_dataset": False}, "--shuffle_dataset false forbids"),
        ({"train_sampling_strategy": "sequential"}, "choose from random, batch_rebalance, group_by_length"),
        ({"train_file": []}, "neither is given"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, Any], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        DataConfig(**{"train_file": ["a.json"]} | flags)


def test_one_file_may_be_given_as_a_string() -> None:
    assert DataConfig(train_file="a.json") == DataConfig(train_file=["a.json"])  # type: ignore[arg-type]


def test_several_processes_tokenize_alike(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": " ".join(WORDS[1 + (i + k) % 7] for k in range(1 + i % 5))} for i in range(100)]
    path = write(tmp_path / "train.jsonl", rows)
    alone = load(path, tokenizer, dataset_num_proc=1)
    assert pairs(load(path, tokenizer, dataset_num_proc=2)) == pairs(alone)
    write(path, [*rows, {"foo": 1}])
    with pytest.raises(LoptError, match="^row 101 of .*no usable columns"):
        load(path, tokenizer, dataset_num_proc=2)


def test_rows_that_the_mapping_leaves_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "def keep(row):\n    return {'text': row['a']} if row['a'] != 'one' else None\n"
    (tmp_path / "chosen.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path / "train.jsonl", [{"a": "one"}, {"a": "two"}, {"a": "three"}])
    loaded = load(path, tokenizer, dataset_mapping="chosen:keep")
    assert [ids for ids, _ in pairs(loaded)] == [[TWO, EOS], [THREE, EOS]]
    assert loaded.summary() == f"3 rows of {path}: 2 used, 1 left out (1 by --dataset_mapping)"


def test_what_was_changed_is_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = SHORT
    ask, reply = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}
    path = write(tmp_path / "train.jsonl", [{"messages": [ask, reply, ask]}, {"messages": [ask, reply]}])
    assert (
        load(path, tokenizer).summary() == f"2 rows of {path}: 2 used; 1 without the messages after their last answer"
    )

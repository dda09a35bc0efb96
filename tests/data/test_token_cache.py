"""Tokens that are cached are those of the file's content and of the tokenizer, whatever happened before."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast
from word_rows import ASSISTANT, EOS, EXPECTED, ONE, ROWS, SHORT, THREE, TWO, USER, load, make_tokenizer, pairs, write

from lopt_pp.errors import LoptError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_cache_knows_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "train.jsonl", ROWS[:1])
    assert pairs(load(path, tokenizer)) == pairs(load(path, tokenizer)) == EXPECTED[:1]
    tokenizer.chat_template = SHORT
    assert pairs(load(path, tokenizer)) == [([USER, ONE, ASSISTANT, TWO, EOS], [-100, -100, -100, TWO, EOS])]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".arrow"])
def test_cache_knows_the_content(suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path, time = tmp_path / f"train{suffix}", (315532800, 315532800)

    def fill(word: str) -> None:
        write_as(path, [{"text": word}, {"text": "three"}])
        os.utime(path, time)

    fill("one")
    assert [ids for ids, _ in pairs(load(path, tokenizer))] == [[ONE, EOS], [THREE, EOS]]
    fill("two")
    assert [ids for ids, _ in pairs(load(path, tokenizer))] == [[TWO, EOS], [THREE, EOS]]
    made = {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.*")}
    moved = tmp_path / f"moved{suffix}"
    path.rename(moved)
    assert [ids for ids, _ in pairs(load(moved, tokenizer))] == [[TWO, EOS], [THREE, EOS]]
    assert made == {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.*")}, "nothing is made anew"


def write_as(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows as the name says."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    match path.suffix:
        case ".jsonl":
            path.write_text(text)
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            pd.DataFrame(rows).to_csv(path, index=False)
        case ".parquet":
            pd.DataFrame(rows).to_parquet(path)
        case ".gz":
            path.write_bytes(gzip.compress(text.encode(), mtime=0))
        case ".arrow":
            with pa.ipc.new_file(str(path), pa.schema({"text": pa.string()})) as file:
                file.write_table(pa.Table.from_pylist(rows))


def test_tokens_that_an_ended_process_has_left_unfinished(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "train.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "three"}])
    expected = pairs(load(path, tokenizer, dataset_num_proc=2))
    first, second = sorted((tmp_path / "cache").rglob("tokens-*_of_00002.arrow"))
    second.unlink()
    assert pairs(load(path, tokenizer, dataset_num_proc=1)) == expected


def test_a_cache_that_cannot_be_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "train.jsonl", ROWS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    with pytest.raises(LoptError, match=f"in {path} cannot be written: Not a directory; set HF_DATASETS_CACHE to a"):
        load(path, tokenizer)

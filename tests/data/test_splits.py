"""Rows that are held out: a share of those to train on, a file, or a split; and what is said where there are none."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import (
    plain_rows,
    write_files,
)
from transformers import AutoTokenizer

from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.data import DataConfig, Rows, TokenizedRows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.data.splits import load_split
from lopt_pp.errors import LoptError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows to train on, and rows to measure."""
    folder = tmp_path_factory.mktemp("splits")
    write_files(folder)
    return folder


def split(files: Path, size: float, seed: int = 0, **more: Any) -> tuple[Rows, TokenizedRows]:
    data = DataConfig(train_file=[str(files / "rows.jsonl")], **more)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    kept, held = load_split(EvaluationConfig(eval_split_size=size), data, tokenizer, seed)
    assert held is not None
    return kept, held.rows[""]


def tokens(rows: Rows) -> list[list[int]]:
    """The token ids of all rows, whatever they are packed into."""
    return [row.input_ids for pack in rows.fetch(np.arange(len(rows))) for row in pack.read()]


@pytest.mark.parametrize(("size", "number"), [(1, 1), (10, 10), (0.5, 18), (0.04, 1)])
def test_a_split_parts_the_rows(files: Path, size: float, number: int) -> None:
    everything = tokens(plain_rows(files / "model", files / "rows.jsonl"))
    kept, held = map(tokens, split(files, size))
    assert len(held) == number and sorted(kept + held) == sorted(everything)
    assert [row for row in everything if row in held] == held, "the order of the file is kept"
    assert tuple(map(tokens, split(files, size))) == (kept, held)


def test_the_seed_draws_the_split(files: Path) -> None:
    assert tokens(split(files, 10, seed=1)[1]) != tokens(split(files, 10, seed=0)[1])


def test_rows_are_held_out_before_they_are_packed(files: Path) -> None:
    kept, held = split(files, 10, packing=True, max_length=120)
    assert len(kept) < 20 and sorted(tokens(kept)) == sorted(tokens(split(files, 10)[0]))
    assert tokens(held) == tokens(split(files, 10)[1])


def test_a_file_is_read_whole_while_others_are_streamed(files: Path) -> None:
    data = DataConfig(train_file=[str(files / "rows.jsonl")], streaming=True, packing=True, max_length=120)
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    _, held = load_split(EvaluationConfig(eval_file=[str(files / "held_out.jsonl")]), data, tokenizer, seed=0)
    assert held is not None and tokens(held.rows[""]) == tokens(plain_rows(files / "model", files / "held_out.jsonl"))
    with pytest.raises(LoptError, match="^--eval_split_size must know .* --streaming does not; give --eval_file$"):
        load_split(EvaluationConfig(eval_split_size=3), data, tokenizer, seed=0)


def test_sets_have_the_names_that_they_are_given(files: Path) -> None:
    """And are told from others by these, as by their rows."""
    data = DataConfig(train_file=[str(files / "rows.jsonl")])
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    paths = {name: str(files / f"{name}.jsonl") for name in ("odd", "held_out")}

    def read(*given: str) -> EvaluationSets:
        _, held = load_split(EvaluationConfig(eval_file=list(given)), data, tokenizer, seed=0)
        assert held is not None
        return held

    sets = read(*(f"{name}={path}" for name, path in paths.items()))
    assert sets.names == ("odd", "held_out") and sets.summary().startswith(f"odd: 10 rows of {paths['odd']}")
    for name, path in paths.items():
        assert tokens(sets.rows[name]) == tokens(read(path).rows[""])
    others = [read(path) for path in paths.values()] + [read(f"a={path}") for path in paths.values()]
    assert len({one.digest for one in [sets, *others]}) == 5


def test_a_split_of_a_dataset(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "rows.jsonl", tmp_path / "train.jsonl")
    shutil.copy(files / "held_out.jsonl", tmp_path / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    data = DataConfig(dataset_name=str(tmp_path))
    kept, held = load_split(EvaluationConfig(dataset_test_split="test"), data, tokenizer, seed=0)
    assert held is not None and (len(kept), len(held.rows[""])) == (37, 13)
    with pytest.raises(LoptError, match=f"^--dataset_name {tmp_path} --dataset_test_split dev cannot be loaded"):
        load_split(EvaluationConfig(dataset_test_split="dev"), data, tokenizer, seed=0)
    with pytest.raises(LoptError, match="^--dataset_test_split test is a split of --dataset_name; give that$"):
        data = DataConfig(train_file=[str(tmp_path / "train.jsonl")])
        load_split(EvaluationConfig(dataset_test_split="test"), data, tokenizer, seed=0)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "^--eval_file .*eval.jsonl does not exist"),
        ("", "^--eval_file .*eval.jsonl is empty"),
        ('{"question": "what?"}\n', "^row 1 of .*eval.jsonl: no usable columns"),
        ('{"input_ids": [1, 5], "labels": [1, -100]}\n' * 2, "^none of the 2 rows of .*eval.jsonl can be used"),
    ],
)
def test_a_file_that_is_of_no_use(files: Path, tmp_path: Path, content: str | None, error: str) -> None:
    path = tmp_path / "eval.jsonl"
    if content is not None:
        path.write_text(content)
    data = DataConfig(train_file=[str(files / "rows.jsonl")])
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    with pytest.raises(LoptError, match=error):
        load_split(EvaluationConfig(eval_file=[str(path)]), data, tokenizer, seed=0)


@pytest.mark.parametrize("size", [0.01, 37, 100])
def test_a_split_that_leaves_nothing(files: Path, size: float) -> None:
    with pytest.raises(LoptError, match=f"^--eval_split_size {size:g} holds .* of the 37 usable rows of .*rows.jsonl"):
        split(files, size)

"""Several data sets as one: the rows that TRL takes of each, and how many times."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from chat import make_tokenizer
from trl import DatasetMixtureConfig, get_dataset
from trl.scripts.utils import DatasetConfig

from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.config.parser import parse_config
from lopt_pp.data import DataConfig, load_rows
from lopt_pp.data.loading import load_unpacked
from lopt_pp.data.splits import load_split
from lopt_pp.data.streaming import StreamedRows
from lopt_pp.errors import LoptError


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 10 texts `a...`, 4 `b...` with another column, and a directory of two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for letter, number in (("a", 10), ("b", 4)):
        rows = [{"text": letter * (1 + n), "more": "x"} for n in range(number)]
        (tmp_path / f"{letter}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "both").mkdir()
    for split in ("train", "test"):
        (tmp_path / "both" / f"{split}.jsonl").write_text(json.dumps({"text": split}))
    return tmp_path


def texts(entries: list[dict[str, Any]], seed: int = 3, **more: Any) -> list[str]:
    """Of the rows that are loaded, in order."""
    tokenizer = make_tokenizer()
    rows = load_rows(DataConfig(datasets=entries, **more), tokenizer, seed=seed)
    found = [row for pack in rows.fetch(np.arange(len(rows))) for row in pack.read()]
    return [str(tokenizer.decode(row.input_ids[1:-1])).replace(" ", "") for row in found]


A: dict[str, Any] = {"path": "json", "data_files": "a.jsonl"}
B: dict[str, Any] = {"path": "json", "data_files": ["b.jsonl"]}


@pytest.mark.parametrize(
    "entries",
    [
        [A, B],
        [A | {"split": "train[2:5]"}, B | {"columns": ["text"]}],
        [A | {"fraction": 0.5}, B | {"fraction": 0.5}],
        [A | {"fraction": 3}, B | {"fraction": 0.7}],
        [{"path": "both", "split": "test"}, {"path": "json", "data_files": {"x": "b.jsonl"}, "split": "x[:50%]"}],
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_rows_are_those_that_trl_takes(entries: list[dict[str, Any]], streaming: bool) -> None:
    mixture = get_dataset(DatasetMixtureConfig(datasets=[DatasetConfig(**entry) for entry in entries]))
    assert texts(entries, streaming=streaming) == mixture["train"]["text"][:]


def test_rows_are_repeated_as_often_as_is_said() -> None:
    entries = [A | {"repeats": 0.5}, {"path": "b.jsonl", "repeats": 2.25}]
    found = texts(entries)
    assert found == texts(entries) == texts(entries, streaming=True) != texts(entries, seed=4)
    counts = Counter(found)
    assert sorted(counts[text] for text in counts if text[0] == "b") == [2, 2, 2, 3]
    assert [counts[text] for text in counts if text[0] == "a"] == [1] * 5


def test_rows_that_come_again_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [A, B | {"repeats": 3}]
    rows = load_unpacked(DataConfig(datasets=entries), make_tokenizer())
    assert (len(rows), rows.summary()) == (
        22,
        "22 rows of 2 data sets (a.jsonl; b.jsonl: 12 of 4 rows): 22 used; column more is not used",
    )
    monkeypatch.setattr("lopt_pp.data.encoding.RowEncoder.__call__", None)  # All are in the cache.
    assert len(load_unpacked(DataConfig(datasets=[A, B]), make_tokenizer())) == 14


def test_others_have_another_digest_and_what_is_mended_the_same(files: Path) -> None:
    def digest(entries: list[dict[str, Any]], without: tuple[int, ...] = (), streaming: bool = True) -> str:
        rows = load_rows(DataConfig(datasets=entries, streaming=streaming), make_tokenizer(), seed=3)
        return rows.digest_without(without)

    kinds = ([A, B], [B, A], [A, B | {"repeats": 2}], [A, B | {"repeats": 1.5}], [A | {"split": "train[1:]"}, B])
    for streaming in (False, True):
        assert len({digest(entries, streaming=streaming) for entries in kinds}) == len(kinds)
    before = digest([A, B | {"repeats": 2}], (11,))
    lines = (files / "b.jsonl").read_text().splitlines()
    (files / "b.jsonl").write_text("\n".join([lines[0], '{"text": "mended"}', *lines[2:]]) + "\n")
    assert digest([A, B | {"repeats": 2}], (11,)) == before != digest([A, B | {"repeats": 2}])
    rows = load_rows(DataConfig(datasets=[A, B], streaming=True), make_tokenizer())
    assert isinstance(rows, StreamedRows) and rows.files_digest is not None


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([A, {"name": "x"}], r"--datasets, entry 2 \(None\): expected keys and values, of which `path` is needed"),
        ([A | {"weight": 2}], r"entry 1 \('json'\): unknown key 'weight'; it may have columns, data_dir"),
        ([A | {"fraction": 1}, B], r"entry 2 \('json'\): give all entries a fraction, or none"),
        ([A | {"repeats": 0}], r"entry 1 \('json'\): repeats 0: above 0"),
        ([A | {"columns": "text"}], r"entry 1 \('json'\): columns 'text': of the wrong type; expected a list"),
        ([A | {"repeats": 2, "fraction": 1}], "give the entries either fraction or repeats"),
        ([A, {"path": "json"}], r"entry 2 \('json'\): path json needs data_files"),
        ([A, {"path": "json", "data_files": "no.jsonl"}], r"entry 2 \('json'\): no.jsonl does not exist"),
        ([{"path": "both", "split": "dev"}], r"entry 1 \('both'\): both split dev cannot be loaded"),
        ([{"path": "a.jsonl", "split": "test"}], "entry 1 .*: split test: files have the split train alone"),
        ([A | {"split": "train[x]"}], r"entry 1 \('json'\): split train\[x\]: "),
        ([A | {"columns": ["prose"]}], r"a.jsonl: a row has none of the columns prose \(it has: text, more\)"),
        ([A, {"path": "both/*.csv"}], r"entry 2 \('both/\*.csv'\): both/\*.csv matches no file"),
    ],
)
def test_an_error_names_the_entry(entries: list[dict[str, Any]], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        texts(entries)


def test_held_out_rows_are_not_trained_on() -> None:
    evaluation = EvaluationConfig(eval_split_size=2)
    rows, held = load_split(evaluation, DataConfig(datasets=[A, B]), make_tokenizer(), 3)
    assert held is not None and len(rows) == 12
    with pytest.raises(LoptError, match="--eval_split_size would hold out rows of --datasets that are trained on"):
        load_split(evaluation, DataConfig(datasets=[A, B | {"repeats": 2}]), make_tokenizer(), 3)


def test_it_is_a_flag_of_a_file_and_of_the_command_line(files: Path) -> None:
    (files / "run.yaml").write_text(
        "model_name_or_path: m\noutput_dir: o\ndatasets:\n  - path: ~/a.jsonl\n    repeats: 2\n  - path: b.jsonl\n"
    )
    entries = parse_config(["--config", "run.yaml"]).data.mixture
    assert [(entry.path, entry.repeats) for entry in entries] == [
        (str(Path("~/a.jsonl").expanduser()), 2),
        ("b.jsonl", None),
    ]
    line = ["--model_name_or_path", "m", "--output_dir", "o", "--datasets", '{"path": "b.jsonl"}', '{"path": "c"}']
    assert [entry.path for entry in parse_config(line).data.mixture] == ["b.jsonl", "c"]
    with pytest.raises(LoptError, match="give exactly one of .*, not datasets and train_file"):
        parse_config([*line, "--train_file", "x"])

"""That the texts which benchmarks/quality measures on can be read whole, and that none is there twice."""

import json
from pathlib import Path

import datasets
import pytest
from chat import CHATML, make_tokenizer

from lopt_pp.data import DataConfig, TokenizedRows, load_rows

TEXTS = Path(__file__).parents[2] / "benchmarks" / "quality" / "texts"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)


@pytest.mark.parametrize(("name", "columns"), [("general", {"text", "source"}), ("instructions", {"messages"})])
def test_every_row_is_used_and_none_is_there_twice(name: str, columns: set[str]) -> None:
    path = TEXTS / f"{name}.jsonl"
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == columns for row in raw)

    rows = load_rows(DataConfig(train_file=[str(path)], max_length=2048), make_tokenizer(CHATML))
    assert isinstance(rows, TokenizedRows)
    assert len(rows) == len(raw) >= 40 and not rows.dropped and not rows.changed
    assert rows.num_targets.min() > 100

    # By what is said first, so that the same question with another answer counts as well.
    first = [row["text"][:80] if name == "general" else row["messages"][0]["content"] for row in raw]
    assert len({" ".join(text.lower().split()) for text in first}) == len(raw)

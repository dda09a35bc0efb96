"""Rows that a model cannot take are refused by name, tokenized before or as their step comes."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from chat import make_tokenizer

from lopt_pp.data import DataConfig, EncodedRow, RowLimits, Rows, load_rows
from lopt_pp.data.microbatch import collate
from lopt_pp.errors import LoptError

LIMITS = RowLimits(num_embeddings=10, num_outputs=8, num_positions=6)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(path: Path, rows: list[dict[str, Any]], limits: RowLimits, streaming: bool, max_length: int = 32) -> Rows:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train_file=[str(path)], streaming=streaming, max_length=max_length)
    return load_rows(config, make_tokenizer(), limits)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"input_ids": [1, 9, 3], "labels": [-100, 7, 0]}, None),
        (
            {"input_ids": [1, 10, 3], "labels": [-100, 7, 0]},
            "the token id 10 is outside the model's, which go from 0 to",
        ),
        ({"input_ids": [1, 9, 3], "labels": [-100, 8, 0]}, "the label 8 is outside the model's, which go from 0 to 7"),
        ({"input_ids": [1] * 6}, None),
        (
            {"input_ids": [1] * 7},
            "it has 7 tokens, and the model's table of positions has 6; --max_length 6 leaves",
        ),
    ],
)
def test_a_row_is_named(tmp_path: Path, row: dict[str, Any], error: str | None, streaming: bool) -> None:
    path, rows = tmp_path / "rows.jsonl", [{"input_ids": [1, 2]}, {"input_ids": [1, 2, 3]}, row, {"input_ids": [4, 5]}]
    if error is None:
        assert len(load(path, rows, LIMITS, streaming)) == 4
        return
    with pytest.raises(LoptError) as refused:
        load(path, rows, LIMITS, streaming)
    assert str(refused.value).startswith(f"row 3 of {path}: {error}")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_left_out_need_not_fit(tmp_path: Path, streaming: bool) -> None:
    rows = [{"input_ids": [1, 2]}, {"input_ids": [90] * 9}, {"input_ids": [1, 2, 3]}]
    used = load(tmp_path / "rows.jsonl", rows, LIMITS, streaming, max_length=6)
    assert sum(len(used.fetch(np.array([number]))) for number in range(len(used))) == 2


def test_a_streamed_row_is_named_when_its_step_comes(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.jsonl", [{"input_ids": [1, 2]}] * 700
    rows[401] = {"input_ids": [1, 44]}
    streamed = load(path, rows, LIMITS, streaming=True)
    assert len(streamed.fetch(np.arange(390, 401))) == 11
    with pytest.raises(LoptError, match=rf"^row 402 of {path}: the token id 44 is outside"):
        streamed.fetch(np.arange(395, 405))
    with pytest.raises(LoptError, match=rf"^row 402 of {path}: the token id 44 is outside"):
        load(path, rows, LIMITS, streaming=False)


@pytest.mark.parametrize("streaming", [False, True])
def test_long_rows_of_a_model_without_a_table_are_warned_of_once(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"input_ids": [1] * length} for length in (2, 7, 9)]
    with caplog.at_level(logging.WARNING, "lopt_pp"):
        for trained in (9, 8, None):
            load(tmp_path / "rows.jsonl", rows, RowLimits(10, 10, None, trained), streaming)
    (message,) = caplog.messages
    assert message.startswith("rows have up to 9 tokens, and the model was pretrained with up to 8")


def test_padding_has_no_positions_beyond_the_longest_row() -> None:
    """Packed rows may leave much room in another pack, and a table of positions is only as long as rows may be."""
    row, short = EncodedRow([1, 2, 3], [1, 2, 3]), EncodedRow([4], [4])
    batch = collate([[row, row], [short]], 0, 0, pad_token_id=0, keep_apart=True)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 0, 1]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, 2, 3], [-100] * 6]

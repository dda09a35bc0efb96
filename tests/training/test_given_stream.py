"""A stream that a script gives is read before the first step, as far as the run needs it."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import AutoTokenizer

from lopt_pp import LoptError, Trainer
from lopt_pp.config.data import IN_MEMORY, DataConfig
from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.data import Rows
from lopt_pp.data.given_stream import GivenStream
from lopt_pp.data.in_memory import raw_rows, training_rows
from lopt_pp.data.splits import load_split

STEPS: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
ROW = {"prompt": "a", "completion": "b"}


def endless() -> Iterator[dict[str, str]]:
    while True:
        yield {"prompt": "a", "completion": "b"}


LONG = {"prompt": "a", "completion": "b" * 60}


def half_usable() -> Iterator[dict[str, str]]:
    for number in itertools.count():
        yield {"prompt": "a", "completion": "b" * (60 if number % 2 else 2)}


def test_an_endless_stream_is_read_as_far_as_the_run_needs_it(inputs: Path, tmp_path: Path) -> None:
    """And farther, where some of its rows cannot be used: none comes twice instead."""
    args = {**STEPS, "output_dir": tmp_path / "out", "save_steps": 0, "max_length": 60, "logging_steps": 1}
    stream = IterableDataset.from_generator(half_usable)
    trainer = Trainer(inputs / "model", args, None, stream, eval_dataset=[ROW])
    before = trainer.evaluate()
    assert trainer.train()
    rows = "12 rows of train_dataset: 6 used, 6 left out (6 longer than --max_length 60)"
    assert rows in (tmp_path / "out" / "run.json").read_text()
    history = trainer.state.log_history
    assert [logs["epoch"] for logs in history if "loss" in logs] == [pytest.approx(n / 3) for n in (1, 2, 3)]
    assert before["eval_loss"] > 0


def test_a_stream_that_hardly_has_a_row_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt_pp.data.given_stream._PER_TABLE", 2)
    stream = GivenStream(IterableDataset.from_generator(endless), "train_dataset", 3)
    sizes = []
    with pytest.raises(LoptError, match="^train_dataset: only 1 of its first 384 rows can be used, and the"):
        while stream.read_for(1):
            sizes.append(len(stream.rows))
    assert sizes == [6, 12, 24, 48, 96, 192, 384]
    assert not stream.read_for(3)
    short = GivenStream(IterableDataset.from_generator(lambda: itertools.islice(endless(), 4)), "train_dataset", 3)
    assert short.read_for(2) and len(short.rows) == 4 and not short.read_for(2)


def test_a_stream_whose_first_rows_cannot_be_used(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read on, as far as one that hardly has a row to use."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")

    def load(stream: Callable[[], Iterator[dict[str, str]]]) -> Rows:
        given = training_rows(IterableDataset.from_generator(stream), 3)
        return load_split(EvaluationConfig(), DataConfig([IN_MEMORY], max_length=60), tokenizer, 0, given=given)[0]

    assert len(load(lambda: itertools.chain([LONG] * 10, endless()))) == 8, "of 3, 6, 12, and then 18"
    with pytest.raises(LoptError, match="^none of the 5 rows of train_dataset can be used"):
        load(lambda: iter([LONG] * 5))
    monkeypatch.setattr("lopt_pp.data.given_stream._PER_TABLE", 4)
    monkeypatch.setattr("lopt_pp.data.given_stream._TIMES_BEFORE_AN_END", 4)
    error = "^train_dataset: only 0 of its first 24 rows can be used, and the run needs 3; none of the 24 rows .*60"
    with pytest.raises(LoptError, match=error):
        load(lambda: itertools.repeat(LONG))


def test_who_waits_for_an_endless_stream_learns_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lopt_pp.data.given_stream._PER_TABLE", 2)
    monkeypatch.setattr("lopt_pp.data.given_stream._TABLES_BEFORE_A_WARNING", 3)
    stream = IterableDataset.from_generator(lambda: itertools.islice(endless(), 9))
    assert len(raw_rows(stream, "eval_dataset")) == 9
    assert caplog.text.count("eval_dataset: 6 rows are read, and it goes on; it must end") == 1

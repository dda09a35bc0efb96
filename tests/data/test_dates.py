"""A template that prints the date prints that of the run's start, whatever day it is, and its cache goes by it."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import trl
from chat import ANSWER, CHATML, MARKED, QUESTION, make_tokenizer
from transformers import PreTrainedTokenizerBase

from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.data import DataConfig, Rows, load_rows
from lopt_pp.data.dates import DatedEncoder, dated, today
from lopt_pp.data.encoding import RowEncoder
from lopt_pp.data.formats import Row
from lopt_pp.data.splits import load_split

DATED = "{{ strftime_now('%d %b %Y, %H:%M') }}" + CHATML
DAYS = date(2026, 1, 31), date(2026, 2, 1)
PRINTED = "31 Jan 2026, 00:00", "01 Feb 2026, 00:00"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(4 * (json.dumps({"messages": [QUESTION, ANSWER]}) + "\n"))
    return path


def texts(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    packs = rows.fetch(np.arange(len(rows)))
    return {"".join(tokenizer.convert_ids_to_tokens(row.input_ids)) for pack in packs for row in pack.read()}


@pytest.mark.parametrize("flags", [{}, {"dataset_num_proc": 2}, {"streaming": True}])
def test_it_prints_the_day_that_is_given(path: Path, flags: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(DATED)
    for _ in range(2):  # The second time from the cache, where there is one.
        for day, printed in zip(DAYS, PRINTED, strict=True):
            rows = load_rows(DataConfig(train_file=[str(path)], **flags), tokenizer, day=day)
            (text,) = texts(rows, tokenizer)
            assert text.startswith(printed), text


def test_it_prints_today_where_no_day_is_given(path: Path) -> None:
    tokenizer = make_tokenizer(DATED)
    days = {today().strftime("%d %b %Y")}
    (text,) = texts(load_rows(DataConfig(train_file=[str(path)]), tokenizer), tokenizer)
    days |= {today().strftime("%d %b %Y")}  # It may have become midnight.
    assert text[:11] in days


def test_held_out_rows_have_the_same_day(path: Path) -> None:
    tokenizer = make_tokenizer(DATED)
    for config in (EvaluationConfig(eval_file=[str(path)]), EvaluationConfig(eval_split_size=1)):
        rows, held_out = load_split(config, DataConfig(train_file=[str(path)]), tokenizer, seed=0, day=DAYS[0])
        assert held_out is not None
        (text,) = texts(rows, tokenizer) | texts(held_out.rows[""], tokenizer)
        assert text.startswith(PRINTED[0])


def test_a_template_without_a_date_has_one_cache_for_all_days(path: Path, cache: Path) -> None:
    tokenizer = make_tokenizer(MARKED)
    encoder = RowEncoder(tokenizer)
    assert dated(encoder, tokenizer, DAYS[0]) is encoder
    for day in DAYS:
        load_rows(DataConfig(train_file=[str(path)]), tokenizer, day=day)
    assert len(list(cache.rglob("tokens-*.arrow"))) == 1


def test_one_of_several_templates_may_have_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": DATED}
    assert isinstance(dated(RowEncoder(tokenizer), tokenizer, DAYS[0]), DatedEncoder)


@pytest.mark.parametrize(("name", "printed"), [("llama3_2", "31 Jan 2026"), ("gptoss", "2026-01-31")])
def test_templates_of_models_that_print_it(name: str, printed: str) -> None:
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = make_tokenizer(template)

    def encode(row: Row) -> None:
        rendered.append(str(tokenizer.apply_chat_template([QUESTION, ANSWER], tokenize=False)))

    rendered: list[str] = []
    dated(encode, tokenizer, DAYS[0])({})
    assert printed in rendered[0]

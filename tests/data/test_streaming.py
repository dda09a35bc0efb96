"""Rows that are tokenized when their step comes: the order and the microbatches are those of rows tokenized before."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from chat import make_tokenizer

from lopt_pp.data import DataConfig, Microbatch, MicrobatchSampler, Rows, load_rows
from lopt_pp.data.streaming import StreamedRows
from lopt_pp.errors import LoptError

WORDS = "abcdefgh"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of(number: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} is ", "completion": WORDS[i % 8] * (1 + i % 13)} for i in range(number)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, streaming: bool = True, max_length: int = 32, **flags: Any) -> Rows:
    return load_rows(
        DataConfig(train_file=[path], streaming=streaming, max_length=max_length, **flags), make_tokenizer()
    )


def make_order(rows: Rows, **options: Any) -> MicrobatchSampler:
    options = {"sampling": "batch_rebalance", "shuffle": True, **options}
    return MicrobatchSampler(
        rows, per_device_train_batch_size=3, gradient_accumulation_steps=2, seed=3, pad_token_id=0, **options
    )


def same(one: Microbatch, other: Microbatch) -> bool:
    names = ("input_ids", "labels", "token_mask", "target_positions")
    return (one.step, one.index) == (other.step, other.index) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_replicas": 2, "replica": 1},
        {"padding_free": True},
        {"shuffle": False},
        {"num_replicas": 2, "drop_last": True},
    ],
)
def test_the_order_is_that_of_rows_tokenized_before(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(40))
    if suffix == "parquet":
        path = str(tmp_path / "rows.parquet")
        datasets.Dataset.from_list(rows_of(40)).to_parquet(path)
    before, streamed = make_order(load(path, streaming=False), **options), make_order(load(path), **options)
    assert streamed.steps_per_epoch == before.steps_per_epoch
    for step in range(2 * before.steps_per_epoch):
        assert streamed.shapes(step) == before.shapes(step)
        assert streamed.counts(step) == before.counts(step)
        batches = zip(streamed.microbatches(step), before.microbatches(step), strict=True)
        assert all(same(*pair) for pair in batches)


@pytest.mark.parametrize("packing", [False, True])
def test_long_rows_are_cut(tmp_path: Path, packing: bool) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(40))
    told: dict[str, Any] = {"max_length": 10, "truncation_mode": "keep_end", "packing": packing}
    streamed, before = load(path, **told), load(path, streaming=False, **told)
    if not packing:
        orders = [make_order(rows) for rows in (streamed, before)]
        assert all(same(*pair) for pair in zip(*(order.microbatches(0) for order in orders), strict=True))
    number = re.search(r"(\d+) cut to --max_length by --truncation_mode", before.summary())
    assert number is not None and 0 < int(number[1]) < 40 and "left out" not in before.summary()
    order = make_order(streamed, shuffle=False)
    for step in range(order.steps_per_epoch):
        order.microbatches(step)
    assert number[0] in streamed.summary()


def test_it_goes_on_at_any_step(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(50))
    sequential = make_order(load(path))
    expected = [sequential.microbatches(step) for step in range(20)]
    sampler = make_order(load(path))
    for step in (17, 4, 9, 0):
        for other in (sampler, make_order(load(path))):
            assert all(same(*pair) for pair in zip(other.microbatches(step), expected[step], strict=True))


def test_only_the_rows_of_a_step_and_a_sample_are_tokenized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load(write(tmp_path / "rows.jsonl", rows_of(2000)))
    encoded: list[int] = []
    encode = rows._encode  # type: ignore[attr-defined]

    def noting(number: int) -> object:
        encoded.append(number)
        return encode(number)

    monkeypatch.setattr(rows, "_encode", noting)
    sampler = make_order(rows)
    sampler.microbatches(0)
    sampler.counts(0), sampler.shapes(0)
    sampler.microbatches(1)  # Made ready while the first step was asked for.
    assert len(encoded) <= 3 * 6 and set(sampler._numbers_of(0).tolist()) <= set(encoded)


def test_rows_that_cannot_be_used_are_left_out_of_their_step(tmp_path: Path) -> None:
    rows = rows_of(12)
    rows[1] = {"prompt": "x", "completion": "y" * 40}
    rows[2] = {"text": ""}
    for number in range(6, 12):
        rows[number] = {"text": ""}
    loaded = load(write(tmp_path / "rows.jsonl", rows))
    sampler = make_order(loaded, shuffle=False, sampling="random")
    first, second = sampler.microbatches(0)
    assert [len(first.input_ids), len(second.input_ids)] == [3, 1]
    assert sampler.counts(0).num_tokens == first.num_tokens + second.num_tokens
    (nothing,) = sampler.microbatches(1)
    assert sampler.shapes(1) == [(1, 1)] == [tuple(nothing.input_ids.shape)]
    assert (sampler.counts(1).num_tokens, sampler.counts(1).num_targets) == (0, 0)
    line = f"12 rows of {tmp_path}/rows.jsonl, tokenized as their step comes; "
    left_out = "12 rows of it: 4 used, 8 left out (1 longer than --max_length 32, 7 without a target token)"
    assert loaded.summary() == f"{line}so far, {left_out}"
    assert load(str(tmp_path / "rows.jsonl")).summary() == f"{line}of a sample, {left_out}"


def test_rows_of_a_step_are_packed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(400))
    sampler = make_order(load(path, packing=True, max_length=64), keep_apart=True)
    plain = make_order(load(path, streaming=False, max_length=64))
    assert sampler.steps_per_epoch < plain.steps_per_epoch / 2
    ids = []
    for step in range(sampler.steps_per_epoch):
        batches = sampler.microbatches(step)
        assert sampler.shapes(step) == [tuple(batch.input_ids.shape) for batch in batches]
        assert all(batch.input_ids.shape[0] <= 3 and batch.input_ids.shape[1] <= 64 for batch in batches)
        assert sampler.counts(step).num_targets == sum(batch.num_targets for batch in batches)
        ids += [token for batch in batches for token in batch.input_ids[batch.token_mask].tolist()]
    expected = [
        token
        for step in range(plain.steps_per_epoch)
        for batch in plain.microbatches(step)
        for token in batch.input_ids[batch.token_mask].tolist()
    ]
    assert sorted(ids) == sorted(expected)


def test_other_data_has_another_digest(tmp_path: Path) -> None:
    rows = rows_of(300)
    path = write(tmp_path / "rows.jsonl", rows)
    digest = load(path).digest
    assert digest == load(path).digest
    others = [rows[:-1], [*rows[:-1], {"text": "x"}], [{"text": "x"}, *rows[1:]]]
    others += [[*rows[:place], {"text": "x"}, *rows[place + 1 :]] for place in range(100, 120)]
    assert digest not in {load(write(tmp_path / "other.jsonl", other)).digest for other in others}
    assert load(path, completion_only_loss=False).digest != digest


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_edit_that_no_sample_shows(tmp_path: Path, suffix: str) -> None:
    def load_as(name: str, rows: list[dict[str, Any]]) -> StreamedRows:
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            write(path, rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(path)
        loaded = load(str(path))
        assert isinstance(loaded, StreamedRows)
        return loaded

    rows = rows_of(600)
    sampled = set(np.linspace(0, 599, 256).astype(int).tolist())
    edited = next(number for number in range(600) if number not in sampled)
    one, same = load_as("one", rows), load_as("same", rows)
    rows[edited] = rows[edited] | {"prompt": rows[edited]["prompt"].replace("is", "if")}
    other = load_as("other", rows)
    assert one.digest == same.digest == other.digest
    assert one.files_digest == same.files_digest != other.files_digest


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\r\n\r\n\n{"text": "\xc3\xa4"}\n{"text": "c"}')
    other = write(tmp_path / "more.jsonl", [{"text": "d"}])
    rows = load_rows(DataConfig(train_file=[str(path), other], streaming=True), make_tokenizer())
    assert [rows._raw[index] for index in range(len(rows))] == [{"text": text} for text in "aäcd"]  # type: ignore[attr-defined]
    assert rows._raw.name(3) == f"row 1 of {other}"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"text": ', r"row 301 of .*rows.jsonl: it is not JSON: "),
        ("[1]", "row 301 of .*rows.jsonl: it is not a JSON object, but list"),
        ('{"foo": 1}', r"row 301 of .*rows.jsonl: no usable columns \(it has: foo\)"),
    ],
)
def test_malformed_row_is_named(tmp_path: Path, line: str, error: str) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, rows_of(500))
    lines = path.read_text().splitlines()
    lines[300] = line
    path.write_text("\n".join(lines))
    with pytest.raises(LoptError, match=error):
        sampler = make_order(load(str(path)), shuffle=False)
        for step in range(sampler.steps_per_epoch):
            sampler.microbatches(step)


def test_no_row_of_the_sample(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": ""}, {"text": "x" * 40}])
    with pytest.raises(
        LoptError,
        match=r"none of 2 rows of .*, from its first to its last, can be used \(1 without a target token, 1 longer "
        r"than --max_length 32\); check --max_length and the answers",
    ):
        load(path)


def test_rows_that_cannot_be_used_end_the_order_before_their_step(tmp_path: Path) -> None:
    """All of the step are named; and the digest without them is that of the file when they are mended."""
    good = [json.dumps(row) for row in rows_of(600)]
    bad = [*good]
    bad[200], bad[201] = '{"prompt": ', '{"prompt": 1, "completion": "a"}'
    path = tmp_path / "rows.jsonl"

    def load_lines(lines: list[str]) -> Rows:
        path.write_text("\n".join(lines) + "\n")
        return load(str(path))

    rows = load_lines(bad)
    order = make_order(rows, shuffle=False)
    assert order.unusable(32) is None and order.unusable(34) is None
    error = order.unusable(33)
    assert error is not None and error.numbers == (200, 201) and order.unusable(33) is error
    assert f"row 201 of {path}: " in str(error) and str(error).endswith(f"nor can these be used: row 202 of {path}")
    without, whole = rows.digest_without(error.numbers), rows.digest
    mended = load_lines(good)
    assert mended.digest_without([201, 200]) == without and mended.digest != whole
    assert mended.digest_without([200]) != without
    assert (
        load_lines([*good[:100], good[101].replace("prompt", "Prompt "), *good[101:]]).digest_without(error.numbers)
        != without
    )
    assert load_lines(good[:150]).digest_without(error.numbers) != without

"""Which rows share a row, and how rows are split: by `trl.pack_dataset`, token for token."""

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pytest
import torch
from chat import make_tokenizer
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lopt_pp.config.data import PackingStrategy
from lopt_pp.data import DataConfig, MicrobatchSampler, RowLimits, Rows, load_rows
from lopt_pp.data.formats import IGNORE_INDEX
from lopt_pp.data.loading import load_unpacked, to_evaluate_on
from lopt_pp.data.packed_rows import SplitRows
from lopt_pp.data.packing import pack
from lopt_pp.errors import LoptError


def test_best_fit_decreasing() -> None:
    packs = pack(np.array([5, 3, 4, 2, 6, 7]), 8)
    assert sorted(sorted(row for row, _, _ in packs[n]) for n in range(len(packs))) == [[0, 1], [2], [3, 4], [5]]


@pytest.mark.parametrize("number", [1, 7, 1000, 2500])
def test_every_row_once_and_none_too_long(number: int) -> None:
    lengths = np.random.default_rng(number).integers(1, 65, number)
    packs = pack(lengths, 64)
    pieces = [piece for n in range(len(packs)) for piece in packs[n]]
    assert sorted(pieces) == [(row, 0, length) for row, length in enumerate(lengths)]
    sizes = packs.totals(packs.stops - packs.starts)
    assert sizes.max() <= 64
    if number >= 1000:
        assert lengths.sum() / (64 * len(packs)) > 0.95


def test_no_rows() -> None:
    assert [len(pack(np.array([], dtype=np.int64), 8, strategy)) for strategy in get_args(PackingStrategy)] == [0, 0, 0]


@pytest.mark.parametrize("strategy", get_args(PackingStrategy))
@pytest.mark.parametrize("number", [1, 5, 1003])
def test_the_packs_are_those_of_trl(strategy: PackingStrategy, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt_pp.data.packing._TOKENS", 10_000)  # In several parts.
    lengths = np.random.default_rng(number).integers(1, 17 if strategy == "bfd" else 70, number)
    tokens = [[1000 * row + place for place in range(length)] for row, length in enumerate(lengths)]
    wanted = pack_dataset(datasets.Dataset.from_dict({"input_ids": tokens}), 16, strategy)
    packs = pack(lengths, 16, strategy)
    found = [[tokens[row][start:stop] for row, start, stop in packs[number]] for number in range(len(packs))]
    assert [list(itertools.chain(*pieces)) for pieces in found] == wanted["input_ids"][:]
    if strategy != "wrapped":
        assert [list(map(len, pieces)) for pieces in found] == wanted["seq_lengths"][:]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Texts of 1 to 80 letters, and one conversation longer than a pack whose question fills it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows: list[dict[str, Any]] = [{"text": "abcdefghij"[n % 10] * (1 + 7 * n % 80)} for n in range(60)]
    rows += [{"prompt": "q" * 50, "completion": "answer"}, {"text": ""}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, strategy: PackingStrategy, **more: Any) -> Rows:
    given = {"packing": True, "packing_strategy": strategy, "max_length": 16, **more}
    return load_rows(DataConfig(train_file=[str(path)], **given), make_tokenizer(), seed=5)


def make_order(rows: Rows, **options: Any) -> MicrobatchSampler:
    options = {"sampling": "random", "shuffle": True, **options}
    return MicrobatchSampler(
        rows, per_device_train_batch_size=3, gradient_accumulation_steps=2, seed=3, pad_token_id=0, **options
    )


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
@pytest.mark.parametrize("streaming", [False, True])
def test_microbatches_are_those_of_trls_collator(texts: Path, strategy: PackingStrategy, streaming: bool) -> None:
    rows = load(texts, strategy, streaming=streaming, shuffle_dataset=False)
    order = make_order(rows, shuffle=False, keep_apart=strategy != "wrapped")
    whole = load_unpacked(DataConfig(train_file=[str(texts)], max_length=10**6), make_tokenizer())
    tokens = whole.dataset.select_columns(["input_ids", "labels"])
    per_step = order._rows_per_step if streaming else len(tokens)
    packed = [
        pack_dataset(tokens.select(range(first, min(first + per_step, len(tokens)))), 16, strategy)
        for first in range(0, len(tokens), per_step)
    ]
    wanted = [pack for part in packed for pack in part]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=strategy != "wrapped")
    seen, num_targets = [row for step in range(order.steps_per_epoch) for row in rows_of(order, step)], 0
    for (ids, labels, positions), expected in zip(seen, wanted, strict=True):
        batch = collate([expected])
        assert ids == batch["input_ids"][0].tolist()
        assert labels[1:] == batch["labels"][0, 1:].tolist()
        starts = batch["position_ids"][0].tolist() if strategy != "wrapped" else list(range(len(ids)))
        assert positions == starts
        num_targets += sum(label != IGNORE_INDEX for label in labels[1:])
    counted = [order.counts(step) for step in range(order.steps_per_epoch)]
    assert sum(counts.num_targets for counts in counted) == num_targets
    assert sum(counts.num_tokens for counts in counted) == sum(whole.lengths)  # No token is lost.
    assert "1 without a target token" in rows.summary()


def rows_of(order: Any, step: int) -> list[tuple[list[int], list[int], list[int]]]:
    """The ids, labels and positions of each sequence of a step, without padding."""
    found = []
    for batch in order.microbatches(step):
        plain = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        positions = plain if batch.position_ids is None else batch.position_ids
        for ids, labels, places, mask in zip(batch.input_ids, batch.labels, positions, batch.token_mask, strict=True):
            found.append((ids[mask].tolist(), labels[mask].tolist(), places[mask].tolist()))
    return found


def test_wrapped_rows_are_shuffled_by_the_seed_first(texts: Path) -> None:
    config = DataConfig(train_file=[str(texts)], packing=True, packing_strategy="wrapped", max_length=16)
    first, again, other = (load_rows(config, make_tokenizer(), seed=seed) for seed in (5, 5, 6))
    read = [[pack.read() for pack in rows.fetch(np.arange(len(rows)))] for rows in (first, again, other)]
    assert read[0] == read[1] != read[2]


def test_replicas_share_the_packs_of_a_step(texts: Path) -> None:
    rows = load(texts, "bfd_split")
    (alone,) = [rows_of(make_order(rows, num_replicas=1), 0)]
    assert len(alone) == 6
    both = [rows_of(make_order(rows, num_replicas=2, replica=replica), 0) for replica in (0, 1)]
    assert sorted(both[0][:3] + both[1][:3]) == sorted(alone)


def test_held_out_rows_are_split_where_training_rows_are(texts: Path) -> None:
    config = DataConfig(train_file=[str(texts)], packing=True, packing_strategy="wrapped", max_length=16)
    whole = load_unpacked(config, make_tokenizer())
    rows = to_evaluate_on(whole, config)
    assert isinstance(rows, SplitRows) and rows.lengths.max() == 16 and rows.lengths.sum() == whole.lengths.sum()
    pieces = [rows[number] for number in range(len(rows))]
    assert [len(piece.input_ids) for piece in pieces] == rows.lengths.tolist()
    assert [piece.num_targets for piece in pieces] == rows.num_targets.tolist()
    assert [i for piece in pieces for i in piece.input_ids] == [
        i for n in range(len(whole)) for i in whole[n].input_ids
    ]
    assert rows.summary().endswith(f"; split into {len(rows)} of at most 16 tokens")
    assert rows.select(np.array([2, 0]), "others")[0] == pieces[2]


def test_pieces_must_fit_the_table_of_positions(texts: Path) -> None:
    config = DataConfig(train_file=[str(texts)], packing=True, packing_strategy="bfd_split", max_length=16)
    assert len(load_rows(config, make_tokenizer(), RowLimits(1000, 1000, num_positions=16))) > 0
    with pytest.raises(LoptError, match="makes rows of --max_length 16 tokens.*has 12; give --max_length 12"):
        load_rows(config, make_tokenizer(), RowLimits(1000, 1000, num_positions=12))

"""Which rows come when, and how they are padded."""

import pytest
import torch
from datasets import Dataset

from lopt_pp.data import DataOrder, Microbatch, TokenizedRows

PAD = 99
NUM_ROWS = 11


@pytest.fixture
def rows() -> TokenizedRows:
    """Row i has i % 4 + 2 tokens, all equal to i, and no loss on the first two (of row 0 mod 4: on the first)."""
    lengths = [i % 4 + 2 for i in range(NUM_ROWS)]
    firsts = [min(2, length - 1) for length in lengths]
    dataset = Dataset.from_dict(
        {
            "input_ids": [[i] * length for i, length in enumerate(lengths)],
            "labels": [
                [-100] * first + [i] * (length - first)
                for i, (length, first) in enumerate(zip(lengths, firsts, strict=True))
            ],
            "length": lengths,
            "num_targets": [length - first for length, first in zip(lengths, firsts, strict=True)],
        }
    )
    return TokenizedRows(dataset, "a test", {})


def make_order(rows: TokenizedRows, shuffle: bool = True, seed: int = 7) -> DataOrder:
    return DataOrder(
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        shuffle=shuffle,
        seed=seed,
        pad_token_id=PAD,
    )


def row_numbers(batches: list[Microbatch]) -> list[list[int]]:
    return [batch.input_ids[:, 0].tolist() for batch in batches]


def epoch_rows(order: DataOrder, epoch: int) -> list[int]:
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    return [row for step in steps for batch in row_numbers(order.microbatches(step)) for row in batch]


def test_without_shuffling_the_rows_keep_their_order(rows: TokenizedRows) -> None:
    order = make_order(rows, shuffle=False)
    assert order.steps_per_epoch == 3
    epoch = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10]]]
    assert [row_numbers(order.microbatches(step)) for step in range(6)] == epoch * 2


def test_last_step_may_lack_microbatches(rows: TokenizedRows) -> None:
    order = DataOrder(
        rows,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        shuffle=False,
        seed=0,
        pad_token_id=PAD,
    )
    assert order.steps_per_epoch == 2
    assert row_numbers(order.microbatches(1)) == [[9, 10]]
    assert row_numbers(order.microbatches(2)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_every_epoch_is_another_permutation_of_all_rows(rows: TokenizedRows) -> None:
    epochs = [epoch_rows(make_order(rows), epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(NUM_ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seed_decides_the_order(rows: TokenizedRows) -> None:
    assert epoch_rows(make_order(rows), 1) == epoch_rows(make_order(rows), 1)
    assert epoch_rows(make_order(rows, seed=8), 0) not in (epoch_rows(make_order(rows), epoch) for epoch in (0, 1))


def test_random_access_equals_sequential(rows: TokenizedRows) -> None:
    sequential = make_order(rows)
    expected = [row_numbers(sequential.microbatches(step)) for step in range(12)]
    order = make_order(rows)
    for step in (11, 0, 5, 4, 8, 1):
        assert row_numbers(order.microbatches(step)) == expected[step]
        assert row_numbers(make_order(rows).microbatches(step)) == expected[step]


def test_shapes_come_from_lengths_alone(rows: TokenizedRows) -> None:
    order = make_order(rows)
    for step in range(7):
        assert order.shapes(step) == [tuple(batch.input_ids.shape) for batch in order.microbatches(step)]


def test_microbatch_tensors(rows: TokenizedRows) -> None:
    batch = make_order(rows, shuffle=False).microbatches(0)[1]
    assert (batch.step, batch.index, batch.num_tokens, batch.num_targets) == (0, 1, 9, 5)
    assert batch.input_ids.tolist() == [[2, 2, 2, 2, PAD], [3, 3, 3, 3, 3]]
    assert batch.labels.tolist() == [[-100, -100, 2, 2, -100], [-100, -100, 3, 3, 3]]
    assert batch.token_mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch.target_positions.tolist() == [1, 2, 3]
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.token_mask.dtype) == (torch.int64, torch.int64, torch.bool)


def test_counts_are_those_of_the_rows(rows: TokenizedRows) -> None:
    order = make_order(rows)
    batches = [batch for step in range(order.steps_per_epoch) for batch in order.microbatches(step)]
    assert sum(batch.num_tokens for batch in batches) == rows.lengths.sum()
    assert sum(batch.num_targets for batch in batches) == rows.num_targets.sum()
    assert all(batch.num_targets == (batch.labels[:, 1:] != -100).sum() for batch in batches)


def test_microbatch_moves_to_a_device(rows: TokenizedRows) -> None:
    batch = make_order(rows).microbatches(4)[1]
    moved = batch.to("meta")
    tensors = (moved.input_ids, moved.labels, moved.token_mask, moved.target_positions)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.step, moved.index) == (4, 1)


def test_epoch_is_that_after_the_step(rows: TokenizedRows) -> None:
    order = make_order(rows)
    assert [order.epoch(step) for step in (0, 2, 5)] == [1 / 3, 1.0, 2.0]

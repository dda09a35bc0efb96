"""Which rows come when, and how they are padded."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from numbered_rows import NUM_ROWS, PAD, Sampling, make_order, numbered_rows
from torch.utils.data import DataLoader

from lopt_pp.data import Microbatch, MicrobatchSampler, TokenCounts, TokenizedRows
from lopt_pp.errors import LoptError


@pytest.fixture
def rows() -> TokenizedRows:
    return numbered_rows()


def row_numbers(batches: list[Microbatch]) -> list[list[int]]:
    return [batch.input_ids[:, 0].tolist() for batch in batches]


def epoch_rows(sampler: MicrobatchSampler, epoch: int) -> list[int]:
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    return [row for step in steps for batch in row_numbers(sampler.microbatches(step)) for row in batch]


def test_without_shuffling_the_rows_keep_their_order(rows: TokenizedRows) -> None:
    sampler = make_order(rows, shuffle=False)
    assert sampler.steps_per_epoch == 3
    epoch = [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10]]]
    assert [row_numbers(sampler.microbatches(step)) for step in range(6)] == epoch * 2


def test_last_step_may_lack_microbatches(rows: TokenizedRows) -> None:
    sampler = MicrobatchSampler(
        rows,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=3,
        shuffle=False,
        seed=0,
        pad_token_id=PAD,
        sampling="random",
    )
    assert sampler.steps_per_epoch == 2
    assert row_numbers(sampler.microbatches(1)) == [[9, 10]]
    assert row_numbers(sampler.microbatches(2)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize(
    ("size", "accumulation", "num_replicas"), [(3, 2, 1), (2, 3, 2), (2, 1, 1), (1, 4, 1), (5, 1, 2)]
)
def test_dropping_the_last_leaves_what_dataloaders_do(
    rows: TokenizedRows, size: int, accumulation: int, num_replicas: int
) -> None:
    """Of `transformers.Trainer`: a loader of microbatches of all replicas, and steps of as many as accumulate."""
    loader: Any = DataLoader(torch.arange(NUM_ROWS), batch_size=size * num_replicas, drop_last=True)  # type: ignore[arg-type]
    options: dict[str, Any] = {"shuffle": False, "sampling": "random", "drop_last": True, "num_replicas": num_replicas}
    options |= {"seed": 0, "pad_token_id": PAD}
    orders = [
        MicrobatchSampler(
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            replica=replica,
            **options,
        )
        for replica in range(num_replicas)
    ]
    steps = orders[0].steps_per_epoch
    assert steps == len(loader) // accumulation + (len(loader) % accumulation > 0)
    seen = [batch for step in range(steps) for order in orders for batch in row_numbers(order.microbatches(step))]
    assert sorted(row for batch in seen for row in batch) == [row for batch in loader for row in batch.tolist()]
    assert all(len(batch) == size for batch in seen)
    with pytest.raises(LoptError, match=f"^--dataloader_drop_last leaves none of the {NUM_ROWS} rows of "):
        MicrobatchSampler(rows, per_device_train_batch_size=99, gradient_accumulation_steps=1, **options)


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
    sampler = make_order(rows)
    for step in (11, 0, 5, 4, 8, 1):
        assert row_numbers(sampler.microbatches(step)) == expected[step]
        assert row_numbers(make_order(rows).microbatches(step)) == expected[step]


def test_shapes_come_from_lengths_alone(rows: TokenizedRows) -> None:
    sampler = make_order(rows)
    for step in range(7):
        assert sampler.shapes(step) == [tuple(batch.input_ids.shape) for batch in sampler.microbatches(step)]


def test_microbatch_tensors(rows: TokenizedRows) -> None:
    batch = make_order(rows, shuffle=False).microbatches(0)[1]
    assert (batch.step, batch.index, batch.num_tokens, batch.num_targets) == (0, 1, 9, 5)
    assert batch.input_ids.tolist() == [[2, 2, 2, 2, PAD], [3, 3, 3, 3, 3]]
    assert batch.labels.tolist() == [[-100, -100, 2, 2, -100], [-100, -100, 3, 3, 3]]
    assert batch.token_mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch.target_positions.tolist() == [1, 2, 3]
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.token_mask.dtype) == (torch.int64, torch.int64, torch.bool)


def test_counts_are_those_of_the_rows(rows: TokenizedRows) -> None:
    sampler = make_order(rows)
    batches = [batch for step in range(sampler.steps_per_epoch) for batch in sampler.microbatches(step)]
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
    sampler = make_order(rows)
    assert [sampler.epoch(step) for step in (0, 2, 5)] == [1 / 3, 1.0, 2.0]


def lengths(batches: list[Microbatch]) -> list[list[int]]:
    return [batch.token_mask.sum(1).tolist() for batch in batches]


def test_the_rows_of_a_step_make_microbatches_of_similar_length(rows: TokenizedRows) -> None:
    plain, balanced = make_order(rows), make_order(rows, sampling="batch_rebalance")
    for step in range(6):
        drawn = [row for batch in row_numbers(plain.microbatches(step)) for row in batch]
        batches = balanced.microbatches(step)
        assert sorted(drawn) == sorted(row for batch in row_numbers(batches) for row in batch)
        flat = [length for batch in lengths(batches) for length in batch]
        assert flat == sorted(flat, reverse=True)
        assert balanced.counts(step) == plain.counts(step)
        assert balanced.shapes(step) == [tuple(batch.input_ids.shape) for batch in batches]


def test_replicas_share_a_step_whatever_the_sampling(rows: TokenizedRows) -> None:
    for sampling in ("random", "batch_rebalance", "group_by_length"):
        alone = MicrobatchSampler(
            rows,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            shuffle=True,
            seed=7,
            pad_token_id=PAD,
            sampling=sampling,
        )
        both = [make_order(rows, sampling=sampling, replica=replica, num_replicas=2) for replica in (0, 1)]
        for step in range(4):
            batches = sorted((b for sampler in both for b in sampler.microbatches(step)), key=lambda batch: batch.index)
            shared = [numbers for numbers in row_numbers(batches) if numbers != [PAD]]
            assert shared == row_numbers(alone.microbatches(step))
            assert both[0].counts(step) == both[1].counts(step) == alone.counts(step)


def test_grouping_by_length_keeps_every_row_and_pads_little() -> None:
    sizes = torch.randint(2, 60, (997,), generator=torch.Generator().manual_seed(0)).tolist()
    columns = {"input_ids": [[i] * size for i, size in enumerate(sizes)], "length": sizes, "num_targets": [1] * 997}
    rows = TokenizedRows(Dataset.from_dict(columns | {"labels": columns["input_ids"]}), "a test", {})

    def padding(sampling: Sampling) -> float:
        sampler = make_order(rows, sampling=sampling)
        shapes = [shape for step in range(sampler.steps_per_epoch) for shape in sampler.shapes(step)]
        return 1 - sum(sizes) / sum(count * length for count, length in shapes)

    for epoch in (0, 1):
        assert sorted(epoch_rows(make_order(rows, sampling="group_by_length"), epoch)) == list(range(997))
    assert padding("group_by_length") < 0.03 < 0.1 < padding("batch_rebalance") < padding("random") - 0.05
    sampler = make_order(rows, sampling="group_by_length")
    steps = [[length for batch in lengths(sampler.microbatches(step)) for length in batch] for step in range(50)]
    assert sum(max(step) - min(step) for step in steps) / 50 > 15, "a step is to have microbatches of several lengths"


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_the_tokens_of_some_microbatches(rows: TokenizedRows, num_replicas: int) -> None:
    """Over all replicas, as those of the whole step are."""
    orders = [make_order(rows, replica=replica, num_replicas=num_replicas) for replica in range(num_replicas)]
    for step in range(orders[0].steps_per_epoch):
        parts = [sampler.microbatches(step) for sampler in orders]
        for indices in ([0], [len(parts[0]) - 1], range(len(parts[0]))):
            batches = [part[index] for part in parts for index in indices]
            counts = orders[-1].counts(step, indices)
            assert counts.num_tokens == sum(batch.num_tokens for batch in batches)
            assert counts.num_targets == sum(batch.num_targets for batch in batches)
        assert orders[0].counts(step, []) == TokenCounts(0, 0)


def test_a_replica_without_rows_has_a_token_of_padding(rows: TokenizedRows) -> None:
    forms: list[dict[str, Any]] = [{}, {"keep_apart": True}, {"padding_free": True}]
    for options in forms:
        sampler = make_order(rows, replica=3, num_replicas=4, shuffle=False, **options)
        (batch,) = sampler.microbatches(0)[1:]
        assert sampler.shapes(0)[1] == tuple(batch.input_ids.shape) == (1, 1)
        assert (batch.num_tokens, batch.num_targets) == (0, 0)

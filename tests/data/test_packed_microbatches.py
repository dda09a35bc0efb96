"""Rows that share a sequence: as packs, and as the one sequence of a padding-free microbatch."""

import numpy as np
import pytest
import torch
from numbered_rows import NUM_ROWS, PAD, make_order, numbered_rows

from lopt_pp.data import TokenizedRows
from lopt_pp.data.packed_rows import PackedRows
from lopt_pp.errors import LoptError


@pytest.fixture
def rows() -> TokenizedRows:
    return numbered_rows()


def test_a_packed_microbatch(rows: TokenizedRows) -> None:
    """Packs of rows 0 and 1 of the data (2 and 3 tokens), of row 3 (5 tokens), of row 2 (4 tokens)..."""
    packed = PackedRows(rows, max_length=6)
    sampler = make_order(packed, shuffle=False, sampling="batch_rebalance", keep_apart=True)
    assert sum(
        len(batch.input_ids) for step in range(sampler.steps_per_epoch) for batch in sampler.microbatches(step)
    ) == len(packed)
    seen = []
    for step in range(sampler.steps_per_epoch):
        batches = sampler.microbatches(step)
        assert sampler.shapes(step) == [tuple(batch.input_ids.shape) for batch in batches]
        assert sampler.counts(step).num_tokens == sum(batch.num_tokens for batch in batches)
        assert sampler.counts(step).num_targets == sum(batch.num_targets for batch in batches)
        for batch in batches:
            usual = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
            positions = usual if batch.position_ids is None else batch.position_ids
            # Attention has a mask only where some sequence needs one.
            assert positions.dtype == torch.int64 and (batch.position_ids is None) == positions.equal(usual)
            for ids, labels, mask, places in zip(
                batch.input_ids, batch.labels, batch.token_mask, positions, strict=True
            ):
                starts = [*(places == 0).nonzero().squeeze(1).tolist(), len(ids)]
                for start, stop in zip(starts, starts[1:], strict=False):
                    assert places[start:stop].tolist() == list(range(stop - start))
                    assert len(set(ids[start:stop].tolist())) == 1, "a row begins where its positions do not"
                    assert labels[start] == -100
                    if mask[start]:
                        row = int(ids[start])
                        assert (ids[start:stop].tolist(), [-100, *labels[start + 1 : stop].tolist()]) == (
                            rows[row].input_ids,
                            [-100, *rows[row].labels[1:]],
                        )
                        seen.append(row)
                    else:
                        assert set(ids[start:stop].tolist()) == {PAD} and stop == len(ids)
    assert sorted(seen) == list(range(NUM_ROWS))


def test_packs_are_full(rows: TokenizedRows) -> None:
    packed = PackedRows(rows, max_length=7)
    assert packed.lengths.sum() == rows.lengths.sum() and packed.lengths.max() <= 7
    assert len(packed) == 6
    filled = rows.lengths.sum() / 42
    assert packed.summary() == f"11 rows of a test: 11 used; packed into 6 of 7 tokens, {filled:.1%} of them filled"


def test_packs_without_a_target_are_counted(rows: TokenizedRows) -> None:
    """Such as those of a long prompt that is cut: the loss of a step of these alone would be 0."""
    packed = PackedRows(rows, max_length=2, strategy="bfd_split")
    empty = sum(pack.num_targets == 0 for pack in packed.fetch(np.arange(len(packed))))
    assert 0 < empty < len(packed)
    assert packed.summary().endswith(f"; {empty} without a target token: raise --max_length to learn from all")
    with pytest.raises(LoptError, match="--packing_strategy bfd_split with --max_length 1 cuts the rows of .* so that"):
        PackedRows(rows, max_length=1, strategy="bfd_split")


def test_a_padding_free_microbatch_has_one_row(rows: TokenizedRows) -> None:
    sampler = make_order(rows, shuffle=False, sampling="batch_rebalance", padding_free=True)
    batch = sampler.microbatches(0)[1]
    assert batch.input_ids.tolist() == [[2] * 4 + [3] * 5]
    assert batch.labels.tolist() == [[-100, -100, 2, 2, -100, -100, 3, 3, 3]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4]]
    assert batch.token_mask.all()
    assert sampler.shapes(0) == [(1, 5), (1, 9)]
    assert sampler.counts(0) == make_order(rows, shuffle=False).counts(0)

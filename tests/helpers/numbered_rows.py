"""Rows that can be told apart, each with its number for tokens, and a sampler of them."""

from typing import Any, Literal

from datasets import Dataset

from lopt_pp.data import MicrobatchSampler, TokenizedRows
from lopt_pp.data.packed_rows import PackedRows

PAD = 99
NUM_ROWS = 11


def numbered_rows() -> TokenizedRows:
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


Sampling = Literal["random", "batch_rebalance", "group_by_length"]


def make_order(
    rows: TokenizedRows | PackedRows, shuffle: bool = True, seed: int = 7, sampling: Sampling = "random", **options: Any
) -> MicrobatchSampler:
    return MicrobatchSampler(
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        shuffle=shuffle,
        seed=seed,
        pad_token_id=PAD,
        sampling=sampling,
        **options,
    )

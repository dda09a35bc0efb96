"""The next step's microbatches are made while a step runs."""

import threading

import pytest
import torch
from datasets import Dataset

from lopt_pp.data import Microbatch, MicrobatchesAhead, MicrobatchSampler, TokenizedRows, UnusableRowsError


def make_sampler() -> MicrobatchSampler:
    ids = [[3 + number] * (number % 4 + 2) for number in range(12)]
    columns = {"input_ids": ids, "labels": ids, "length": [len(row) for row in ids]}
    columns["num_targets"] = [len(row) - 1 for row in ids]
    return MicrobatchSampler(
        TokenizedRows(Dataset.from_dict(columns), "a test", {}),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        shuffle=True,
        seed=0,
        pad_token_id=0,
    )


class Noted:
    """A sampler that notes which thread made which step, and cannot make one of them."""

    def __init__(self, unusable: int = -1) -> None:
        self.sampler, self.unusable = make_sampler(), unusable
        self.made: dict[int, threading.Thread] = {}
        self.has_made = {step: threading.Event() for step in range(8)}

    def microbatches(self, step: int) -> list[Microbatch]:
        self.made[step] = threading.current_thread()
        try:
            if step == self.unusable:
                raise UnusableRowsError("row 7", [7])
            return self.sampler.microbatches(step)
        finally:
            self.has_made[step].set()


def test_a_thread_makes_the_next_step_the_same_and_none_beyond_the_last() -> None:
    noted, alone = Noted(), make_sampler()
    ahead = MicrobatchesAhead(noted, 5, in_thread=True, pins=False)  # type: ignore[arg-type]
    for step in (2, 3, 4):  # A run that went on from a checkpoint.
        for own, usual in zip(ahead.microbatches(step), alone.microbatches(step), strict=True):
            assert torch.equal(own.input_ids, usual.input_ids) and own.index == usual.index
        if step < 4:
            assert noted.has_made[step + 1].wait(60), "the next step is not made while this one runs"
    assert sorted(noted.made) == [2, 3, 4] and threading.main_thread() not in noted.made.values()


def test_an_error_of_rows_comes_in_their_own_step() -> None:
    ahead = MicrobatchesAhead(Noted(unusable=1), 3, in_thread=True, pins=False)  # type: ignore[arg-type]
    ahead.microbatches(0)
    with pytest.raises(UnusableRowsError, match="row 7"):
        ahead.microbatches(1)


def test_without_a_gpu_there_is_no_thread() -> None:
    noted = Noted()
    ahead = MicrobatchesAhead(noted, 3, in_thread=False)  # type: ignore[arg-type]
    ahead.microbatches(0)
    assert noted.made == {0: threading.main_thread()}

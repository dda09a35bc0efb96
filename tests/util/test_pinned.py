"""Copies into pinned memory: of a whole stage, on CPUs without the pinning, and on a GPU with it."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_stages import FIRST, accumulate, equal, make_stage, microbatches
from tiny import write_model

from lopt_pp.stage import state
from lopt_pp.util import pinned
from lopt_pp.util.pinned import PinnedMemory


def test_a_stage_is_copied_into_the_same_memory_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "_register", lambda memory: True)
    monkeypatch.setattr(pinned, "_unregister", lambda memory: None)
    monkeypatch.setattr(state, "_is_pinnable", lambda value: isinstance(value, torch.Tensor))
    stage = make_stage(write_model(tmp_path, tie_word_embeddings=False), FIRST)
    stage._pinned = PinnedMemory()
    places = []
    for step in range(3):
        copies, reading = stage.begin_copy()
        reading.wait()
        assert equal(copies, stage.state())
        # Pieces of one stretch are tensors of their own to safetensors.
        save_file(copies, tmp_path / "copy.safetensors")
        assert equal(load_file(tmp_path / "copy.safetensors"), copies)
        places.append(next(iter(copies.values())).untyped_storage().data_ptr())
        accumulate(stage, microbatches(step=step))
        stage.step(step)
    assert places[0] != places[1] == places[2]  # The first step adds AdamW's state.
    assert stage.begin_copy(keeps=False)[0] == {}


def test_what_cannot_be_pinned_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pinned, "_register", lambda memory: False)
    memory, tensor = PinnedMemory(), torch.arange(5)
    with caplog.at_level(logging.WARNING, "lopt_pp"):
        for _ in range(2):
            memory.begin([tensor.nbytes, 0, tensor.nbytes])
            first, empty, second = (memory.copy(own) for own in (tensor, tensor[:0], tensor + 1))
            assert torch.equal(first, tensor) and empty.shape == (0,) and torch.equal(second, tensor + 1)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "128 bytes of main memory cannot be pinned"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_copy_does_not_hold_up_the_host() -> None:
    device = torch.device("cuda")
    tensor, memory = torch.ones(1 << 24, device=device), PinnedMemory()
    memory.begin([tensor.nbytes])
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # Cycles of the device; the call returns at once.
    copy = memory.copy(tensor)
    done = torch.cuda.current_stream().record_event()
    assert copy.is_pinned() and not done.query()
    done.synchronize()
    assert bool(copy.all())

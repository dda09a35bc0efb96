"""A checkpoint's parts are read tensor by tensor, straight to where each belongs, and checked before any is."""

import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_stages import FIRST, LAST, accumulate, equal, make_stage, microbatches
from tiny import write_model

from lopt_pp.checkpoint.manifest import DamagedError, Manifest, Part
from lopt_pp.checkpoint.parts import OpenParts
from lopt_pp.checkpoint.resume import Start
from lopt_pp.errors import LoptError
from lopt_pp.stage.stage import Stage


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


@pytest.fixture
def trained(llama: Path) -> Stage:
    """A stage after a step: its optimizer has moments."""
    stage = make_stage(llama, FIRST)
    accumulate(stage, microbatches())
    stage.step(0)
    return stage


@pytest.fixture
def manifest(tmp_path: Path, llama: Path, trained: Stage) -> Manifest:
    """Of a checkpoint of both stages after a step."""
    manifest = Manifest(tmp_path, 1, (FIRST, LAST), {}, (Part(0, ""), Part(0, "")))
    for stage in (trained, make_stage(llama, LAST)):
        save_file(stage.state(), manifest.path(stage.index))
    return manifest


@pytest.mark.parametrize("is_same_cut", [True, False])
def test_a_stage_resumes_with_one_tensor_in_memory(
    llama: Path, manifest: Manifest, trained: Stage, monkeypatch: pytest.MonkeyPatch, is_same_cut: bool
) -> None:
    held: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    counts = []
    read = OpenParts.__getitem__

    def counting(parts: OpenParts, name: str) -> torch.Tensor:
        tensor = read(parts, name)
        held.add(tensor.untyped_storage())
        counts.append(len(held))
        return tensor

    monkeypatch.setattr(OpenParts, "__getitem__", counting)
    stage, specs = make_stage(llama, FIRST), manifest.specs
    Start("", manifest).load([stage], specs if is_same_cut else (*specs, specs[-1]))
    assert max(counts) <= 2 < len(counts)  # The one before, until there is the next, and that.
    own = stage.state()
    if is_same_cut:
        assert equal(own, trained.state())
        return
    assert not any(name.startswith("exp_avg.") for name in own)
    expected = trained.state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items() if name.startswith("block."))


def gone(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def other_shape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:1].clone()


def other_dtype(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].half()


def no_known_dtype(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int16)


@pytest.mark.parametrize(
    "name", ["block.model.layers.1.mlp.up_proj.weight", "exp_avg.block.model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("change", [gone, other_shape, other_dtype, no_known_dtype])
def test_nothing_is_changed_where_a_tensor_does_not_fit(
    llama: Path, manifest: Manifest, change: Callable[[dict[str, torch.Tensor], str], None], name: str
) -> None:
    if name.startswith("exp_avg.") and change is no_known_dtype:
        pytest.skip("an optimizer may have whole numbers of its own")
    tensors = load_file(manifest.path(0))
    change(tensors, name)
    save_file(tensors, manifest.path(0))
    stage = make_stage(llama, FIRST)
    before = stage.state()
    with pytest.raises(LoptError, match=rf"the checkpoint('s tensor| has no tensor) {name}"):
        Start("", manifest).load([stage], manifest.specs)
    assert equal(stage.state(), before)


def test_a_part_that_is_cut_short_is_damaged(manifest: Manifest) -> None:
    path = manifest.path(0)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DamagedError, match="is not a whole safetensors file"), OpenParts(manifest, [1, 0]) as parts:
        for name in parts:
            parts[name]

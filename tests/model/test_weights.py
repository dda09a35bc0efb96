"""What a stage reads of a checkpoint and what it writes."""

import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import load, weight_of
from launching import HELPERS, run
from results import load_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from weight_files import INDEX, Tensors, change, write_halves, write_model

from lopt_pp.errors import LoptError
from lopt_pp.model.dtypes import cast_parameters
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.shares import ShareOf
from lopt_pp.model.weights import PretrainedWeights, shard_name, write_index, write_shard


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_blocks_have_the_checkpoints_tensors(tmp_path: Path, family: str, shard_size: str) -> None:
    whole = write_model(tmp_path, family, shard_size, tie_word_embeddings=False)
    assert (tmp_path / INDEX).exists() == (shard_size != "1GB")
    loaded = [dict(load(tmp_path, stage).model.named_parameters()) for stage in (0, 1)]
    expected = dict(whole.named_parameters())
    assert sorted([*loaded[0], *loaded[1]]) == sorted(expected)
    for name, parameter in [*loaded[0].items(), *loaded[1].items()]:
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_stage_does_not_open_the_files_of_others(tmp_path: Path, stage: int, damage: str) -> None:
    whole = write_halves(tmp_path)
    other = tmp_path / ("second.safetensors", "first.safetensors")[stage]
    if damage == "gone":
        other.unlink()
    else:
        other.write_bytes(other.read_bytes()[:100])
    expected = dict(whole.named_parameters())
    parameters = dict(load(tmp_path, stage).model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters.items())
    with pytest.raises(LoptError, match="missing" if damage == "gone" else "not a whole safetensors file"):
        load(tmp_path, 1 - stage)


def test_a_stage_reads_its_own_tensors_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_model(tmp_path, tie_word_embeddings=False)
    asked: list[str] = []
    read = PretrainedWeights.read

    def noting(checkpoint: PretrainedWeights, names: list[str], *where: Any) -> Tensors:
        asked.extend(names)
        return read(checkpoint, names, *where)

    monkeypatch.setattr(PretrainedWeights, "read", noting)
    owned = [name for name, _ in load(tmp_path, 0).model.named_parameters()]
    assert sorted(asked) == sorted(owned)
    assert len(asked) < 0.6 * len(dict(whole.named_parameters()))


@pytest.mark.parametrize(("family", "most"), [("llama", 0), ("qwen3_moe", 8)])
def test_a_stage_holds_one_stored_tensor_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, most: int
) -> None:
    """Besides what has its place in the block already; of tensors that are fused into one, these."""
    write_model(tmp_path, family, tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path)
    held: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    placed: set[int] = set()
    counts = []
    read = PretrainedWeights.read

    def counting(checkpoint: PretrainedWeights, names: list[str], *where: Any) -> Tensors:
        counts.append(sum(storage.data_ptr() not in placed for storage in held))
        tensors = read(checkpoint, names, *where)
        for tensor in tensors.values():
            held.add(tensor.untyped_storage())
        return tensors

    def place(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        placed.add(parameter.untyped_storage().data_ptr())

    monkeypatch.setattr(PretrainedWeights, "read", counting)
    hook = register_module_parameter_registration_hook(place)
    try:
        load(tmp_path, 0)
    finally:
        hook.remove()
    assert max(counts) <= most < len(counts)


def test_what_is_kept_takes_the_place_of_each_parameter(tmp_path: Path) -> None:
    """As where replicas hold a share each: the whole of it is gone before the next one is read."""
    write_model(tmp_path, "gpt2", tie_word_embeddings=True)
    expected = dict(load(tmp_path, 0, num_stages=1).model.named_parameters())
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def keep(parameter: nn.Parameter) -> nn.Parameter:
        assert not alive
        alive.add(parameter.untyped_storage())
        return ShareOf.make(parameter, parameter.detach()[1:3].clone())

    block = load(tmp_path, 0, num_stages=1, keep=keep)
    found = dict(block.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert isinstance(parameter, ShareOf) and parameter.is_meta and parameter.shape == expected[name].shape
        assert torch.equal(parameter.share, expected[name][1:3])
    cast_parameters(block, "cpu", torch.bfloat16)
    assert all(parameter.share.dtype == parameter.dtype == torch.bfloat16 for parameter in found.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_become_two_tensors(tmp_path: Path, family: str) -> None:
    whole = write_model(tmp_path, family, tie_word_embeddings=True)
    first, last = (load(tmp_path, stage).model for stage in (0, 1))
    embedding, head = weight_of(first.get_input_embeddings()), weight_of(last.get_output_embeddings())
    assert torch.equal(embedding, head) and torch.equal(embedding, weight_of(whole.get_input_embeddings()))
    assert embedding.data_ptr() != head.data_ptr()
    assert not first.config.tie_word_embeddings and not last.config.tie_word_embeddings


def test_tied_embeddings_become_two_tensors_in_one_block(tmp_path: Path) -> None:
    write_model(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path, 0, num_stages=1).model
    embedding, head = weight_of(model.get_input_embeddings()), weight_of(model.get_output_embeddings())
    assert torch.equal(embedding, head)
    assert embedding is not head and embedding.data_ptr() != head.data_ptr()


def test_a_head_of_its_own_is_read_even_where_the_config_ties_it(tmp_path: Path) -> None:
    """As transformers does it."""
    write_model(tmp_path, tie_word_embeddings=True)
    change(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(128, 64)}))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight
    assert torch.equal(expected, torch.ones(128, 64))
    assert torch.equal(load(tmp_path, 1).model.get_output_embeddings().weight, expected)


@pytest.mark.parametrize("stage", [0, 1])
def test_bfloat16_weights_become_float32(tmp_path: Path, stage: int) -> None:
    write_model(tmp_path, tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    stored = load_file(tmp_path / "model.safetensors")
    for name, parameter in load(tmp_path, stage).model.named_parameters():
        assert parameter.dtype == torch.float32
        assert stored[name].dtype == torch.bfloat16 and torch.equal(parameter, stored[name].float())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_shards_of_all_stages_are_an_ordinary_model(tmp_path: Path, family: str, tied: bool) -> None:
    whole = write_model(tmp_path / "before", family, tie_word_embeddings=tied)
    after = tmp_path / "after"
    after.mkdir()
    config = AutoConfig.from_pretrained(tmp_path / "before")
    config.tie_word_embeddings = False
    config.save_pretrained(after)
    shards = {}
    for stage, spec in enumerate(split_evenly(4, 3)):
        shards[shard_name(spec)] = write_shard(load(tmp_path / "before", stage, num_stages=3), after)
    write_index(shards, after)

    loaded = load_model(after, dtype=torch.float32)
    expected = whole.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert weight_of(loaded.get_output_embeddings()).data_ptr() != weight_of(loaded.get_input_embeddings()).data_ptr()

    # The names and layout are those of the checkpoint that training started from, plus the untied head.
    before = load_file(tmp_path / "before" / "model.safetensors")
    index = json.loads((after / INDEX).read_text())
    assert index["weight_map"].keys() == before.keys() | {"lm_head.weight"}
    written = {name: tensor for file in shards for name, tensor in load_file(after / file).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert sorted(file.name for file in after.glob("*.safetensors")) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]


# Prints by how many MiB the peak resident memory of a process rises when it loads the whole model, stage 0 and stage 1.
# Each is a fork of one that has imported everything: what is imported on the way is not the model's memory.
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_a_stage_never_holds_the_other_half(tmp_path: Path) -> None:
    """By the kernel's high-water mark of a process that loads the whole model, and of one that loads a half."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=6,
        num_attention_heads=12,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    assert 200 < size < 300
    model.save_pretrained(tmp_path / "large")
    del model
    write_model(tmp_path / "small")

    result = run([sys.executable, str(HELPERS / "load_memory.py"), str(tmp_path / "large"), str(tmp_path / "small")])
    assert result.returncode == 0, result.stderr
    whole, first, second = map(float, result.stdout.split())
    assert 0.9 * size < whole
    for half in (first, second):
        assert 0.4 * size < half < 0.65 * whole

"""What a stage reads of a checkpoint and what it writes; and what is said about checkpoints that cannot be used."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import load, weight_of
from families import tiny_config
from launching import HELPERS, run
from results import load_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from lopt_pp.errors import LoptError
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.weights import PretrainedWeights, shard_name, write_index, write_shard

INDEX = "model.safetensors.index.json"

Tensors = dict[str, torch.Tensor]


def write_model(path: Path, family: str = "llama", shard_size: str = "1GB", **changes: Any) -> PreTrainedModel:
    """Writes a whole model with random weights, none of them at its initial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path, max_shard_size=shard_size)
    return model


def change(path: Path, edit: Callable[[Tensors], object]) -> None:
    """Rewrites the one safetensors file of a model."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def write_halves(path: Path, **changes: Any) -> PreTrainedModel:
    """Writes a model as two files with an index, one for each of two stages."""
    model = write_model(path, tie_word_embeddings=False, **changes)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    of_first = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    files = {name: "first.safetensors" if name.startswith(of_first) else "second.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"weight_map": files}))
    return model


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

    def noting(checkpoint: PretrainedWeights, names: list[str]) -> Tensors:
        asked.extend(names)
        return read(checkpoint, names)

    monkeypatch.setattr(PretrainedWeights, "read", noting)
    owned = [name for name, _ in load(tmp_path, 0).model.named_parameters()]
    assert sorted(asked) == sorted(owned)
    assert len(asked) < 0.6 * len(dict(whole.named_parameters()))


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


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoptError, match=r"no safetensors weights \(model.safetensors or .*\), none; convert"):
        PretrainedWeights(str(tmp_path))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        LoptError,
        match=r"no safetensors weights .*, only pickled weights \(pytorch_model.bin\), which are refused since",
    ):
        PretrainedWeights(str(tmp_path))


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoptError, match=f"^--model_name_or_path {tmp_path / 'gone'}: "):
        PretrainedWeights(str(tmp_path / "gone"))


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "sub/x.safetensors", ".", ".."]
)
def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": file}}))
    with pytest.raises(LoptError) as refused:
        PretrainedWeights(str(tmp_path))
    assert str(refused.value) == f"{tmp_path / INDEX} names the file {file!r}, which is not a plain file name beside it"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content, errors="surrogateescape")
    with pytest.raises(LoptError, match=f"{INDEX} is not a safetensors index with a weight_map"):
        PretrainedWeights(str(tmp_path))


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    write_halves(tmp_path)
    (tmp_path / "second.safetensors").unlink()
    with pytest.raises(LoptError, match=f"^{tmp_path}: second.safetensors is missing, though the index names it$"):
        load(tmp_path, 1)


def test_an_index_that_names_a_tensor_which_the_file_lacks(tmp_path: Path) -> None:
    write_halves(tmp_path)
    tensors = load_file(tmp_path / "second.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "second.safetensors")
    with pytest.raises(
        LoptError, match=f"^{tmp_path}: the index puts model.norm.weight in second.safetensors, which does not have it$"
    ):
        load(tmp_path, 1)


@pytest.mark.parametrize("keep", [0.99, 0.001, 0.0])
def test_a_file_that_is_cut_short(tmp_path: Path, keep: float) -> None:
    write_model(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(LoptError, match=f"^{file} is not a whole safetensors file: .*; fetch it again$"):
        PretrainedWeights(str(tmp_path))


def test_missing_tensors_are_named_with_the_stage(tmp_path: Path) -> None:
    write_model(tmp_path, tie_word_embeddings=False)
    missing = ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"]
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in missing])
    load(tmp_path, 0)
    with pytest.raises(LoptError) as refused:
        load(tmp_path, 1)
    text = "tensors of stage 1 are missing or of another shape"
    assert str(refused.value) == f"{tmp_path}: {text}: {', '.join(missing)}"


def test_an_untied_head_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    write_model(tmp_path, tie_word_embeddings=False)
    change(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(LoptError, match="tensors of stage 1 are missing or of another shape: lm_head.weight$"):
        load(tmp_path, 1)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    write_model(tmp_path)
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name])
    with pytest.raises(LoptError, match=r"stage 1 .*: model\.layers\.2\.\S*( model\.layers\.2\.\S*){4} and 4 more$"):
        load(tmp_path, 1)


def test_wrong_shapes_are_named_with_the_stage(tmp_path: Path) -> None:
    write_model(tmp_path, tie_word_embeddings=False)
    change(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 4)}))
    load(tmp_path, 1)
    with pytest.raises(
        LoptError, match=r"tensors of stage 0 .*: model.layers.0.mlp.up_proj.weight \(has \[3, 4\], needs \[96, 64\]\)$"
    ):
        load(tmp_path, 0)


@pytest.mark.parametrize("lost", ["up_proj", "experts.3"])
def test_experts_that_are_incomplete(tmp_path: Path, lost: str) -> None:
    """One matrix of an expert, and a whole expert."""
    write_model(tmp_path, "qwen3_moe", tie_word_embeddings=False)
    last = [name for name in load_file(tmp_path / "model.safetensors") if "layers.3.mlp.experts.3." in name]
    change(tmp_path, lambda tensors: [tensors.pop(name) for name in last if lost in name])
    load(tmp_path, 0)
    with pytest.raises(LoptError, match="tensors of stage 1 .*(experts, are incomplete|experts.gate_up_proj .*needs)"):
        load(tmp_path, 1)


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

"""What is said about the files of a model that a stage cannot load."""

import json
from pathlib import Path

import pytest
import torch
from blocks import load
from safetensors.torch import load_file, save_file
from weight_files import INDEX, change, write_halves, write_model

from lopt_pp.errors import LoptError
from lopt_pp.model.weights import PretrainedWeights


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

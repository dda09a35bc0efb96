"""A name that does not lead to a whole model of `transformers` is refused at once, with what it is instead."""

import json
from pathlib import Path

import pytest
from tiny import write_model

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.location import check_location, explain
from lopt_pp.model.pretrained import load_model_config
from lopt_pp.model.weights import PretrainedWeights

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}


@pytest.mark.parametrize("name", ["gone", "./gone", "../gone", "gone/", "a/b/c", "~/gone", "/gone", "C:\\gone"])
def test_a_path_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "gone":  # It may be a hub id.
        check_location(name)
        return
    with pytest.raises(LoptError) as refused:
        check_location(name)
    assert str(refused.value) == f"{name}: no such directory"


def test_a_hub_id_is_not_a_path_because_there_is_a_directory_of_its_organization(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-100").mkdir(parents=True)
    check_location("org/other")
    for name in ("out/checkpoint-200", "out/final", "org/checkpoint-1"):
        with pytest.raises(LoptError, match=f"^{name}: no such directory$"):
            check_location(name)


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], r"is an adapter \(LORA\) of org/base and .* Merge it"),
        (["adapter_config.json", "config.json"], r"is an adapter \(LORA\) of org/base"),
        (["a-Q4_K_M.gguf"], r'a-Q4_K_M.gguf is a GGUF file, .*from_pretrained\("{}", gguf_file="a-Q4_K_M.gguf"\)'),
        (["a.gguf", "config.json"], "a.gguf is a GGUF file"),
        (["config.json", "model.onnx"], "holds a model for ONNX Runtime, .* exported from"),
        (["onnx/model.onnx"], "holds a model for ONNX Runtime"),
        (["adapter_config.json", "config.json", "model.safetensors"], None),
        (["a.gguf", "config.json", "model.safetensors"], None),
        (["config.json"], None),
    ],
)
def test_directories_of_something_else(files: list[str], error: str | None, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for name in files:
        (tmp_path / name).write_text(json.dumps(ADAPTER) if name.startswith("adapter_config") else "")
    if error is None:
        check_location(str(tmp_path))
        return
    with pytest.raises(LoptError, match=error.format(tmp_path)) as refused:
        check_location(str(tmp_path))
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)
    with pytest.raises(LoptError, match=f"^--model_name_or_path {tmp_path}"):
        load_model_config(ModelConfig(str(tmp_path)))


def test_what_the_hub_says_does_not_hide_that_a_directory_is_missing(tmp_path: Path) -> None:
    unreachable = "We couldn't connect to 'https://huggingface.co' to load the files"
    assert explain("org/gone", unreachable) == f"there is no such directory, and as for the hub: {unreachable}"
    assert explain(str(tmp_path), unreachable) == unreachable
    assert explain("org/gone", "of another kind") == "of another kind"


@pytest.mark.parametrize("content", ["", "[]", '{"peft_type": 3}'])
def test_an_adapters_config_may_hold_anything(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(LoptError, match="is an adapter"):
        check_location(str(tmp_path))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(LoptError, match=r"model.safetensors is a file; give the model's directory"):
        check_location(str(model / "model.safetensors"))
    check_location(str(model / "config.json"))  # For `lopt-pp plan`.
    with pytest.raises(LoptError, match=r"config.json is a file; give the model's directory$"):
        PretrainedWeights(str(model / "config.json"))
    with pytest.raises(LoptError, match=r"x.gguf: no such file$"):
        check_location(str(tmp_path / "x.gguf"))

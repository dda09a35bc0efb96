"""All of a model but its weights is saved as the pretrained one has it, or refused before the first step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.pretrained import description, load_model_config, load_tokenizer, model_class_of, write_description


def describe(model: Path, scratch: Path, tokenizer: Any = None) -> dict[str, bytes]:
    config = ModelConfig(str(model))
    own = load_model_config(config)
    own_tokenizer = tokenizer or load_tokenizer(config)
    return description(scratch, config, own, own_tokenizer, model_class_of(own), torch.float32)


@pytest.fixture
def model(inputs: Path, tmp_path: Path) -> Path:
    """A model to change."""
    return shutil.copytree(inputs / "model", tmp_path / "model")


def test_the_config_names_the_class_that_was_trained(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    assert json.loads(describe(model, tmp_path / "scratch")["config.json"])["architectures"] == ["LlamaForCausalLM"]


def test_it_does_not_need_the_pretrained_model_any_more(model: Path, tmp_path: Path) -> None:
    files = describe(model, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    shutil.rmtree(model)
    write_description(tmp_path / "out", files)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_return_sequences": 4}, "Greedy methods"),
        ({"early_stopping": "perhaps"}, "early_stopping"),
        ({"watermarking_config": 3}, "int"),
        ([1], "mapping"),
        (None, "not a valid JSON file"),
    ],
)
def test_settings_that_transformers_does_not_load_are_refused(
    model: Path, tmp_path: Path, settings: object, why: str
) -> None:
    (model / "generation_config.json").write_text("{half" if settings is None else json.dumps(settings))
    with pytest.raises(LoptError, match=f"its generation_config.json cannot be used: .*{why}.*; mend the file, or"):
        describe(model, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


def test_settings_that_it_loads_are_saved(model: Path, tmp_path: Path) -> None:
    """Also those that it does not save once an id of them has followed the tokenizer, or, before 5.20, at all."""
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 1}))
    changed = GenerationConfig.from_pretrained(model)
    changed.eos_token_id = 2
    with pytest.raises(ValueError, match="invalid"):
        changed.save_pretrained(tmp_path)
    saved = json.loads(describe(model, tmp_path / "scratch")["generation_config.json"])
    assert {name: saved[name] for name in settings} == settings and saved["eos_token_id"] != 1


def test_settings_in_the_config_of_an_older_model_are_kept(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"do_sample": True, "temperature": 0.7}))
    files = describe(model, tmp_path / "scratch")
    assert json.loads(files["generation_config.json"])["temperature"] == 0.7
    assert "temperature" not in json.loads(files["config.json"])


def test_a_tokenizer_that_cannot_be_saved_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(ModelConfig(str(model)))

    def save(directory: Path) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr(tokenizer, "save_pretrained", save)
    with pytest.raises(LoptError, match=f"the tokenizer of {model} can be read but not saved again .*type set"):
        describe(model, tmp_path / "scratch", tokenizer)


def test_a_disk_that_cannot_be_written_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LoptError, match=f"{tmp_path}/nowhere/scratch cannot be written: .*No such file"):
        describe(model, tmp_path / "nowhere" / "scratch")

"""A model's config.json of every kind: a config, or a clear error; and code that comes with it never runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DEEP, JUNK, contents, json_files, share
from tiny import write_model

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.pretrained import load_model_config, load_tokenizer

DOCUMENT: dict[str, Any] = json.loads(tiny_config("llama").to_json_string(use_diff=False))
OWN = {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
VALUES = JUNK | st.sampled_from(["own", "bert", "gpt2", "qwen3_moe", "float99", "../own", "other--repo--own.Own", OWN])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    (directory / "own.py").write_text("from pathlib import Path\nPath(__file__).with_name('has-run').touch()\n")
    return directory


@given(
    json_files(DOCUMENT, VALUES) | json_files(DOCUMENT | OWN, VALUES) | json_files({"model_type": "own"} | OWN, VALUES)
)
@example(DEEP.encode())
@example(b"[]")
@example(b"null")
@example(json.dumps({"model_type": "own"} | OWN).encode())
def test_configs_of_models(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    try:
        config = load_model_config(ModelConfig(str(directory)))
    except LoptError as error:
        assert str(directory) in str(error)
    else:
        assert isinstance(config.model_type, str)
    assert not (directory / "has-run").exists(), "code that came with a model has run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("whole"))


@share(5)
@given(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), st.data())
def test_tokenizers(whole: Path, file: str, data: st.DataObject) -> None:
    original = (whole / file).read_bytes()
    (whole / file).write_bytes(data.draw(json_files(json.loads(original)) | contents(original)))
    try:
        load_tokenizer(ModelConfig(str(whole)))
    except LoptError as error:
        assert str(whole) in str(error)
    finally:
        (whole / file).write_bytes(original)

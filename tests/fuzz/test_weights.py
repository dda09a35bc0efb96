"""Indexes and headers of safetensors files of every kind: the tensors that they name, or a clear error."""

import functools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_config
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DEEP, JUNK, contents, documents, json_files, share
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from lopt_pp.errors import LoptError
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.structure import ModelStructure
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.util.compat_transformers import parameter_names

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"

TENSORS = {
    "first.safetensors": {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, 2)},
    "second.safetensors": {"c": torch.tensor(7, dtype=torch.int64), "a": torch.ones(2)},
}
SECRET = torch.full((3,), 13.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two shards, beside a file that is none of its own."""
    folder = tmp_path_factory.mktemp("weights")
    for place in ("secret.safetensors", "model/inner/secret.safetensors"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: SECRET.clone() for name in "abc"}, folder / place)
    for name, tensors in TENSORS.items():
        save_file(tensors, folder / "model" / name)
    return folder / "model"


FILES = st.sampled_from(
    ["first.safetensors", "second.safetensors", "gone.safetensors", "../secret.safetensors", "inner/secret.safetensors"]
    + ["{outside}/secret.safetensors", "..\\secret.safetensors", "./first.safetensors", "first.safetensors/", INDEX]
    + ["inner", ".", "..", "", "first.safetensors\0", "\ud800.safetensors", "x" * 300, "~/x", "file:///etc/passwd"]
)
DOCUMENT = {
    "metadata": {"total_size": 40},
    "weight_map": {"a": "first.safetensors", "b": "first.safetensors", "c": "second.safetensors"},
}


@given(json_files(DOCUMENT, FILES | JUNK))
@example(DEEP.encode())
@example(b'{"weight_map": {}}')
@example(b'{"weight_map": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(b'{"weight_map": {"a": "first.safetensors", "a": "../secret.safetensors"}}')
def test_indexes(model: Path, content: bytes) -> None:
    (model / INDEX).write_bytes(content.replace(b"{outside}", str(model.parent).encode()))
    try:
        checkpoint = PretrainedWeights(str(model))
    except LoptError as error:
        assert str(model / INDEX) in str(error)
        return
    assert all((model / file).parent == model and file not in ("", ".", "..") for file in checkpoint.files.values())
    for name, file in checkpoint.files.items():
        try:
            (tensor,) = checkpoint.read([name]).values()
        except LoptError as error:
            assert str(model) in str(error)
            assert name not in TENSORS.get(file, {})
        else:
            assert torch.equal(tensor, TENSORS[file][name])


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A file of the format, with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


DATA = struct.pack("<6f", *range(6)) + struct.pack("<2q", 7, 8)
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]},
}
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U64": 8}
HEADER_VALUES = JUNK | st.sampled_from(
    [*DTYPES, "C64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "U32", "U16", "PICKLE"]
    + [[0, 40], [24, 24], [40, 24], [0, 2**63], [6], [3, 2], [2**32, 2**32], [2**62, 4], [0, 2**40], 24, 40]
)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("single")


@given(
    st.builds(safetensors, documents(HEADER, HEADER_VALUES), st.just(DATA) | st.binary(max_size=64))
    | st.builds(safetensors, st.just(HEADER), st.just(DATA), st.integers(0, 2**64 - 1))
    | contents(safetensors(HEADER, DATA))
)
@example(safetensors(HEADER, DATA, 2**64 - 1))
@example(safetensors(HEADER, DATA, 99_999_999))
@example(safetensors(DEEP.encode(), b""))
@example(safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"\0"))
def test_files(single: Path, content: bytes) -> None:
    (single / WHOLE).write_bytes(content)
    try:
        checkpoint = PretrainedWeights(str(single))
        tensors = checkpoint.read(list(checkpoint.files))
    except LoptError as error:
        assert str(single) in str(error) and WHOLE in str(error)
        assert len(str(error)) < 1000
        return
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    assert tensors.keys() == header.keys() - {"__metadata__"}
    for name, tensor in tensors.items():
        start, stop = header[name]["data_offsets"]
        assert list(tensor.shape) == header[name]["shape"]
        assert tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() == data[start:stop]


@functools.cache
def structure() -> tuple[PreTrainedConfig, ModelStructure]:
    config = tiny_config("llama")
    return config, check_split(LlamaForCausalLM, config, split_evenly(config.num_hidden_layers, 2))


PARTS = st.sampled_from(
    ["model", "layers", "0", "1", "-1", "x", "", "99999999999", "self_attn", "q_proj", "weight", "²"]
)


@share(4)
@given(st.lists(PARTS, max_size=6).map(".".join) | st.text(max_size=12))
@example("model.layers.")
@example("model.layers.x.weight")
@example("model.layers.²")
def test_names_of_tensors(name: str) -> None:
    """Whatever a file calls a tensor, a stage can tell whether it is its own."""
    config, parts = structure()
    assert isinstance(config, LlamaConfig)
    with torch.device("meta"):
        names = parameter_names(LlamaForCausalLM(config), [name])
    owners = [spec for spec in split_evenly(config.num_hidden_layers, 2) if parts.owns(spec, names[name])]
    assert len(owners) <= 1

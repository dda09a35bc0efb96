"""The result has the pretrained model's dtypes, tensor by tensor, or the one that is asked for; rounded once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from results import load_model, weights
from safetensors.torch import load_file, save_file
from tiny import write_inputs, write_model

import lopt_pp.cli
from lopt_pp.checkpoint.export import export
from lopt_pp.checkpoint.manifest import read_manifest, seal
from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.world import connect
from lopt_pp.training.run import run

NORM = "model.layers.3.input_layernorm.weight"
"""Is stored in float32, among weights in bfloat16."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("dtypes"), rows=12, tie_word_embeddings=True)
    path = folder / "model" / "model.safetensors"
    tensors = {name: tensor if name == NORM else tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    # What the config says of it, float32, is not so.
    assert dtype_in_config(folder / "model") == "float32"
    return folder


def train(files: Path, out: Path, *flags: str) -> Path:
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {out}"
    config = parse_config([*given.split(), "--max_steps", "4", "--learning_rate", "1e-2", *flags])
    with connect(config.pipeline) as world:
        assert run(config, world)
    return out


@pytest.fixture(scope="module")
def out(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run with a checkpoint at its end."""
    return train(files, tmp_path_factory.mktemp("saved") / "out", "--save_steps", "2")


@pytest.fixture(scope="module")
def in_float32(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, with a result in float32."""
    return train(files, tmp_path_factory.mktemp("saved") / "out", "--save_dtype", "float32")


def dtype_in_config(directory: Path) -> str:
    return json.loads((directory / "config.json").read_text())["dtype"]


def test_the_result_has_the_pretrained_dtypes(files: Path, out: Path, in_float32: Path) -> None:
    exact, saved = weights(in_float32), weights(out)
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.float32} == {NORM}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.bfloat16}
    for name, tensor in saved.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), f"{name} was rounded otherwise than once, at the end"
    assert (dtype_in_config(out), dtype_in_config(in_float32)) == ("bfloat16", "float32")
    assert load_model(out, dtype="auto").dtype == torch.bfloat16
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (out, in_float32)]
    assert sizes[0] < 0.6 * sizes[1]


def test_checkpoints_keep_what_is_trained_and_know_the_pretrained_dtypes(
    out: Path, in_float32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = out / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    assert [part.dtype for part in manifest.parts] == [torch.bfloat16] * 2
    assert [dict(part.other_dtypes) for part in manifest.parts] == [{}, {NORM: torch.float32}]
    tensors = [tensor for stage in (0, 1) for tensor in manifest.read_part(stage, "block.").values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    for dtype in ("auto", "float32", "float16"):
        target = tmp_path / dtype
        assert lopt_pp.cli.main(["export", str(checkpoint), str(target), "--save_dtype", dtype]) == 0
    exact, own, half = (weights(tmp_path / dtype) for dtype in ("float32", "auto", "float16"))
    assert {name: tensor.dtype for name, tensor in own.items()} == {n: t.dtype for n, t in weights(out).items()}
    for other in (own, half):
        assert all(torch.equal(tensor, exact[name].to(tensor.dtype)) for name, tensor in other.items())
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    found = [dtype_in_config(tmp_path / dtype) for dtype in ("auto", "float32", "float16")]
    assert found == ["bfloat16", "float32", "float16"]
    assert load_model(tmp_path / "float16", dtype="auto").dtype == torch.float16


def test_a_checkpoint_that_does_not_know_them_is_exported_as_it_is(out: Path, tmp_path: Path) -> None:
    """Those of earlier versions."""
    old = shutil.copytree(out / "checkpoint-2", tmp_path / "checkpoint-2")
    content = json.loads((old / "manifest.json").read_text())
    for part in content["parts"]:
        for name in ("dtype", "other_dtypes"):
            part.pop(name, None)
    del content["sha256"]
    (old / "manifest.json").write_text(json.dumps(seal(content)))
    export(old, tmp_path / "exported")
    assert {tensor.dtype for tensor in weights(tmp_path / "exported").values()} == {torch.float32}
    assert dtype_in_config(tmp_path / "exported") == "float32"


def test_nothing_becomes_wider_than_it_was_trained(files: Path, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", str(write_model(tmp_path / "in-float32")), "--dtype", "pure_bfloat16"]
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        result = train(files, tmp_path / dtype, *flags, "--save_dtype", dtype)
        assert {tensor.dtype for tensor in weights(result).values()} == {expected}
        assert dtype_in_config(result) == str(expected).removeprefix("torch.")

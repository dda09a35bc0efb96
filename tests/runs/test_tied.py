"""Tied embeddings stay tied where one process trains the whole model end to end, and nowhere else."""

import json
from pathlib import Path

import pytest
import torch
from ranks import ranks
from results import load_model, weights
from tiny import InputsWith
from transformers import AutoModelForCausalLM

from lopt_pp.checkpoint.export import export

COMMON = "--method e2e --learning_rate 1e-2 --max_steps 6 --save_steps 3 --adam_epsilon 1e-6"
PARTS = "the input and output embeddings, which the pretrained model ties, are two tensors"


@pytest.fixture(scope="module")
def files(inputs_with: InputsWith) -> Path:
    return inputs_with(rows=24, tie_word_embeddings=True)


def train(files: Path, folder: Path, processes: int, flags: str, status: int = 0) -> str:
    """What the ranks of a run say that leaves `FOLDER/out`."""
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} {COMMON} {flags}"
    arguments = [*given.split(), "--output_dir", str(folder / "out")]
    with ranks(folder, *[arguments] * processes) as started:
        assert [rank.status(120) for rank in started] == [status] * processes, started[0].text
        return "".join(rank.text for rank in started)


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run in one process."""
    folder = tmp_path_factory.mktemp("tied")
    log = train(files, folder, 1, "--per_device_train_batch_size 4")
    assert PARTS not in log
    return folder / "out"


def test_the_result_and_its_checkpoints_are_tied(files: Path, whole: Path, tmp_path: Path) -> None:
    export(whole / "checkpoint-3", tmp_path / "exported")
    for out in (whole, tmp_path / "exported"):
        assert "lm_head.weight" not in weights(out)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
        loaded = load_model(out).state_dict()
        assert torch.equal(loaded["model.embed_tokens.weight"], loaded["lm_head.weight"])
    before = AutoModelForCausalLM.from_pretrained(files / "model").state_dict()
    assert not torch.equal(before["model.embed_tokens.weight"], weights(whole)["model.embed_tokens.weight"])


def test_a_run_goes_on_as_if_nothing_had_happened(files: Path, whole: Path, tmp_path: Path) -> None:
    train(files, tmp_path, 1, f"--per_device_train_batch_size 4 --resume_from_checkpoint {whole / 'checkpoint-3'}")
    after, expected = weights(tmp_path / "out"), weights(whole)
    assert after.keys() == expected.keys()
    assert [name for name in after if not torch.equal(after[name], expected[name])] == []


def test_checkpoints_do_not_pass_between_one_tensor_and_two(files: Path, whole: Path, tmp_path: Path) -> None:
    size, problem = "--per_device_train_batch_size 4", "whether the input and output embeddings are tied is"
    log = train(files, tmp_path / "2", 2, f"{size} --resume_from_checkpoint {whole / 'checkpoint-3'}", 1)
    assert f"{whole / 'checkpoint-3'} is of another run: {problem} False, and was True" in log
    log = train(files, tmp_path / "pipeline", 2, size)
    assert log.count(PARTS) == 1 and "lm_head.weight" in weights(tmp_path / "pipeline" / "out")
    checkpoint = tmp_path / "pipeline" / "out" / "checkpoint-3"
    log = train(files, tmp_path / "1", 1, f"{size} --resume_from_checkpoint {checkpoint}", 1)
    assert f"{checkpoint} is of another run: {problem} True, and was False" in log


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_replicas_of_the_whole_model_keep_them_tied(files: Path, whole: Path, tmp_path: Path, sharding: str) -> None:
    flags = "--per_device_train_batch_size 2 --data_parallel 2 --pipeline_processes 1"
    train(files, tmp_path, 2, f"{flags} --sharding {sharding}")
    trained, expected = weights(tmp_path / "out"), weights(whole)
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-4)


def test_frozen_embeddings_leave_a_head_that_learns(files: Path, tmp_path: Path) -> None:
    assert PARTS in train(files, tmp_path, 1, "--per_device_train_batch_size 4 --train_embeddings false")
    after = weights(tmp_path / "out")
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])

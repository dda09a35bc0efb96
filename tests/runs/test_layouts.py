"""Stages over processes, replicas, cuts and methods: what must give the same weights, and what must not."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from ranks import ranks
from results import weights
from tiny import InputsWith, write_model
from transformers import AutoTokenizer

from lopt_pp.data import DataConfig, MicrobatchSampler, load_rows

COMMON = "--learning_rate 1e-3 --local_learning_rate 3e-4 --adam_epsilon 1e-6 --weight_decay 0.1 --max_steps 8"

NEXT_TOKEN = "--local_objective next_token --local_head_warmup_steps 3 --train_embeddings false"


@pytest.fixture(scope="module")
def files(inputs_with: InputsWith) -> Path:
    # Neither whole steps nor whole microbatches: the last step of an epoch has a replica without rows.
    return inputs_with(rows=37, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(inputs_with: InputsWith) -> Path:
    """One process trains tied embeddings end to end as the one tensor that they are; a pipeline cannot."""
    return inputs_with(rows=37)


def train(files: Path, out: Path, processes: int, flags: str) -> dict[str, torch.Tensor]:
    """The weights after a run."""
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {out / 'out'}"
    arguments = [*given.split(), *COMMON.split(), *flags.split()]
    with ranks(out, *[arguments] * processes) as started:
        for rank in started:
            assert rank.status(120) == 0, rank.text
    return weights(out / "out")


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "out" / "metrics.jsonl").read_text().splitlines()]


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_close(
    first: dict[str, torch.Tensor],
    second: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor],
    embeddings_are_frozen: bool = False,
) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        if embeddings_are_frozen and "embed_tokens" in name:
            assert torch.equal(tensor, start[name]) and torch.equal(second[name], start[name])
            continue
        moved = (tensor - start.get(name, start["model.embed_tokens.weight"])).abs().max()
        assert moved > 5e-4, f"{name} has hardly moved: the comparison would prove nothing"
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-5, msg=partial("{}: {}".format, name))


LAYOUTS = {
    "3 stages": ("--num_stages 3", [2, 3]),
    "a stage for each layer": ("--num_stages 4 --gradient_accumulation_steps 2", [2, 4]),
    "cuts by hand": ("--num_stages 3 --split 1,2", [2]),
    "frozen": ("--method frozen --num_stages 3", [3]),
    "next token, 3 stages": ("--local_objective next_token --local_head_warmup_steps 3 --num_stages 3", [3]),
    "pure_bfloat16": ("--dtype pure_bfloat16", [2]),
    "gradient checkpointing": ("--gradient_checkpointing true", [2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_processes_change_nothing(files: Path, tmp_path: Path, name: str) -> None:
    flags, numbers = LAYOUTS[name]
    flags += " --per_device_train_batch_size 3"
    alone = train(files, tmp_path / "1", 1, flags)
    for processes in numbers:
        assert_same(train(files, tmp_path / str(processes), processes, flags), alone)


@pytest.mark.parametrize(
    "flags",
    [
        "--num_stages 1 --data_parallel 2",
        "--num_stages 2 --data_parallel 2",
        "--num_stages 2 --data_parallel 2 --sharding full",
        "--num_stages 3 --data_parallel 2 --pipeline_processes 1 --sharding full",
        pytest.param(f"--num_stages 2 {NEXT_TOKEN} --data_parallel 2 --pipeline_processes 1", id="next token"),
        pytest.param(
            f"--num_stages 2 {NEXT_TOKEN} --data_parallel 2 --pipeline_processes 1 --sharding full",
            id="next token, sharded",
        ),
    ],
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_replicas_equal_one_on_the_whole_batch(files: Path, tmp_path: Path, flags: str, accumulation: int) -> None:
    """One with twice the batch, and for more than one microbatch, one with twice the microbatches."""
    stages = flags.split(" --data_parallel")[0]
    rows, microbatches = ("4", "1") if accumulation == 1 else ("2", "4")
    stages += f" --per_device_train_batch_size {rows} --gradient_accumulation_steps {microbatches}"
    alone = train(files, tmp_path / "1", 1, stages)
    processes = 2 if "num_stages 1" in flags or "pipeline_processes 1" in flags else 4
    flags += f" --per_device_train_batch_size 2 --gradient_accumulation_steps {accumulation}"
    assert_close(train(files, tmp_path / "2", processes, flags), alone, weights(files / "model"), NEXT_TOKEN in flags)
    expected, records = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for name in ("loss", "reconstruction_loss", "auxiliary_loss", "grad_norm", "num_tokens"):
        of_two, of_one = ([record.get(name, 0.0) for record in run] for run in (records, expected))
        assert of_two == pytest.approx(of_one, rel=1e-3)


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_replicas_learn_from_the_same_share_of_a_step(files: Path, tmp_path: Path, sharding: str) -> None:
    """Each from one of its two microbatches, in turn, is one replica from two of its four."""
    flags = "--num_stages 2 --local_objective next_token --local_learning_rate 1e-3"
    flags += " --per_device_train_batch_size 2 --max_steps 4"
    alone = train(files, tmp_path / "1", 1, f"{flags} --gradient_accumulation_steps 4 --local_accumulation_steps 2")
    shared = f"{flags} --gradient_accumulation_steps 2 --local_accumulation_steps 1 --data_parallel 2"
    shared += f" --pipeline_processes 1 --sharding {sharding}"
    assert_close(train(files, tmp_path / "2", 2, shared), alone, weights(files / "model"))
    expected, records = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for name in ("loss", "auxiliary_loss", "grad_norm"):
        both, one = ([record.get(name, 0.0) for record in run] for run in (records, expected))
        assert both == pytest.approx(one, rel=1e-3)


def test_frozen_stages_stay_the_same_and_the_last_one_learns(files: Path, tmp_path: Path) -> None:
    start, trained = weights(files / "model"), train(files, tmp_path, 2, "--method frozen")
    moved = {name for name, tensor in trained.items() if name in start and not torch.equal(tensor, start[name])}
    assert moved and all(
        name.startswith(("model.layers.2", "model.layers.3", "model.norm", "lm_head")) for name in moved
    )
    first, last = metrics(tmp_path)[:2]
    assert "reconstruction_loss" not in first and "grad_norm" not in first and first["backward_seconds"] == 0
    assert last["loss"] > 0


def test_the_first_steps_are_the_heads_alone(files: Path, tmp_path: Path) -> None:
    """Where the whole run is warm-up, all blocks but the last are as they were; and so are the stages after them."""
    start = weights(files / "model")
    trained = train(files, tmp_path / "1", 2, "--local_head_warmup_steps 8 --local_objective next_token")
    moved = {name for name, tensor in trained.items() if name in start and not torch.equal(tensor, start[name])}
    assert moved and all(name.startswith(("model.layers.2", "model.layers.3", "model.norm")) for name in moved)
    first = [record for record in metrics(tmp_path / "1") if record["stage"] == 0]
    assert {record["learning_rate"] for record in first} == {0.0} and all(record["grad_norm"] > 0 for record in first)
    assert first[-1]["auxiliary_loss"] < first[0]["auxiliary_loss"]
    # What a later stage learns does not depend on what the head of an earlier one has learned meanwhile.
    assert_same(train(files, tmp_path / "2", 1, "--local_objective none"), trained)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_train_alike(files: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=2)
    flags = f"--model_name_or_path {model} --per_device_train_batch_size 37"
    compiled = train(files, tmp_path / "compiled", 1, f"{flags} --torch_compile true")
    assert_close(compiled, train(files, tmp_path / "eager", 1, flags), weights(model))


def test_one_stage_is_ordinary_training(files: Path, tmp_path: Path) -> None:
    flags = "--num_stages 1 --max_grad_norm 0 --shuffle_dataset false --per_device_train_batch_size 5"
    trained = train(files, tmp_path, 1, flags)
    sampler = MicrobatchSampler(
        load_rows(DataConfig(train_file=[str(files / "rows.jsonl")]), AutoTokenizer.from_pretrained(files / "model")),
        per_device_train_batch_size=5,
        gradient_accumulation_steps=1,
        shuffle=False,
        seed=0,
        pad_token_id=0,
    )
    steps = [reference.without_padding(sampler.microbatches(step)) for step in range(8)]
    expected = reference.train(
        str(files / "model"),
        [],
        steps,
        boundary=None,
        weight=0.0,
        rate=1e-3,
        head_rate=0.0,
        weight_decay=0.1,
        epsilon=1e-6,
    )
    assert_close(trained, expected, weights(files / "model"))


@pytest.mark.parametrize(
    ("flags", "processes"),
    [
        ("--gradient_accumulation_steps 2", 2),
        ("--gradient_accumulation_steps 4 --num_stages 3 --split 1,2", 3),
        ("--num_stages 2 --data_parallel 2", 4),
        ("--num_stages 2 --data_parallel 2 --pipeline_processes 1 --sharding full", 2),
        ("--train_embeddings false", 2),
    ],
)
def test_end_to_end_is_the_same_in_one_process_and_as_a_pipeline(
    untied: Path, tmp_path: Path, flags: str, processes: int
) -> None:
    files = untied
    size = 6 if "data_parallel" in flags else 3
    accumulation = flags.partition("--gradient_accumulation_steps ")[2][:1] or "1"
    # One process holds the whole model, wherever the cuts of others lie.
    alone = f"--method e2e --split 3 --per_device_train_batch_size {size} --gradient_accumulation_steps {accumulation}"
    embeddings_are_frozen = "train_embeddings" in flags
    alone += " --train_embeddings false" * embeddings_are_frozen
    expected = train(files, tmp_path / "1", 1, alone)
    trained = train(files, tmp_path / "2", processes, f"--method e2e --per_device_train_batch_size 3 {flags}")
    assert_close(trained, expected, weights(files / "model"), embeddings_are_frozen)
    losses = [[record["loss"] for record in metrics(tmp_path / run) if "loss" in record] for run in ("1", "2")]
    assert len(losses[0]) == 8 and losses[1] == pytest.approx(losses[0], rel=1e-3)

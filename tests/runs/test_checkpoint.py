"""Checkpoints: what is saved, what may be gone on from, and that the weights end as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import Rank, ranks, until
from results import weights
from tiny import write_inputs, write_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_pp.cli
from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints

COMMON = "--learning_rate 1e-3 --adam_epsilon 1e-6 --weight_decay 0.1 --lr_scheduler_type cosine --warmup_steps 3"

BATCH = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"


def start(files: Path, folder: Path, processes: int, flags: str, out: Path | None = None) -> list[Rank]:
    """A run to its end."""
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --max_steps 10 --save_steps 3"
    given += f" --output_dir {out or folder / 'out'} {COMMON}"
    arguments = [*given.split(), *flags.split()]
    with ranks(folder, *[arguments] * processes) as started:
        for rank in started:
            rank.status(120)
    return started


def train(files: Path, folder: Path, processes: int, flags: str, out: Path | None = None) -> str:
    """A run that succeeds; what rank 0 has said."""
    started = start(files, folder, processes, flags, out)
    assert [rank.process.exitcode for rank in started] == [0] * processes, "".join(rank.text for rank in started)
    return started[0].text


def same(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    assert one and one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and the run that nothing happened to: `whole/out`, with checkpoints after 3, 6, 9 and 10 steps."""
    folder = write_inputs(tmp_path_factory.mktemp("files"), rows=18, tie_word_embeddings=True, attention_dropout=0.1)
    train(folder, folder / "whole", 2, BATCH)
    return folder


@pytest.fixture
def interrupted(files: Path, tmp_path: Path) -> Path:
    """The output directory of the same run, had it ended after 7 steps."""
    out = tmp_path / "interrupted"
    for step in (3, 6):
        shutil.copytree(files / "whole" / "out" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    lines = (files / "whole" / "out" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:14]) + lines[14][:20])
    return out


def test_a_checkpoint_holds_all_that_a_stage_needs(files: Path) -> None:
    out = files / "whole" / "out"
    assert [path.name for path in complete_checkpoints(out)] == [f"checkpoint-{step}" for step in (10, 9, 6, 3)]
    manifest = read_manifest(out / "checkpoint-6")
    assert manifest.step == 6 and [(spec.start, spec.stop) for spec in manifest.specs] == [(0, 2), (2, 4)]
    first, last = (manifest.read_part(stage) for stage in (0, 1))
    weights = {name for name in first if name.startswith(("block.", "objective."))}
    assert "block.model.embed_tokens.weight" in first and any(name.startswith("objective.head") for name in first)
    assert first.keys() == weights | {
        f"{kind}.{name}" for name in weights for kind in ("exp_avg", "exp_avg_sq", "step")
    }
    assert "block.lm_head.weight" in last and last["step.block.lm_head.weight"].item() == 6
    assert not list(out.glob("*unfinished*")) and not list(out.rglob("*.bin")) and not list(out.rglob("*.pt"))
    modes = {path.stat().st_mode for path in (out / "checkpoint-6").iterdir()}
    assert modes == {(out / "run.json").stat().st_mode}, "some files are for fewer readers than others"


@pytest.mark.parametrize(
    ("processes", "flags"),
    [(2, BATCH), (1, BATCH), (2, f"{BATCH} --queue_depth 7 --gradient_checkpointing true")],
)
def test_the_weights_end_as_if_nothing_had_happened(
    files: Path, interrupted: Path, tmp_path: Path, processes: int, flags: str
) -> None:
    log = train(files, tmp_path, processes, f"{flags} --resume_from_checkpoint latest", interrupted)
    assert "going on from" in log and "after step 6" in log
    assert same(interrupted, files / "whole" / "out")
    steps = [json.loads(line) for line in (interrupted / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["stage"]) for record in steps] == [(s, k) for s in range(1, 11) for k in (0, 1)]
    assert (interrupted / "checkpoint-9").is_dir()


def test_an_auxiliary_network_goes_on_too(files: Path, tmp_path: Path) -> None:
    """From within the warm-up and from after it; from the checkpoint and the pretrained model, which has the head."""
    given = f"{BATCH} --local_objective next_token --local_head_warmup_steps 4 --train_embeddings false"
    train(files, tmp_path / "whole", 2, given)
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-3"
    first = read_manifest(checkpoint).read_part(0)
    assert "objective.network.model.model.norm.weight" in first and not any("lm_head" in name for name in first)
    for step in (3, 6):
        log, out = tmp_path / f"log-{step}", tmp_path / f"from-{step}"
        train(files, log, 2, f"{given} --resume_from_checkpoint {checkpoint.with_name(f'checkpoint-{step}')}", out)
        assert same(out, tmp_path / "whole" / "out")


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_replicas_go_on_from_one_and_one_from_replicas(files: Path, tmp_path: Path, sharding: str) -> None:
    """Within the rounding of float32, since gradients are summed in another order. (Without dropout.)"""
    model = write_model(tmp_path / "model", tie_word_embeddings=True)
    base, one = f"--model_name_or_path {model}", "--per_device_train_batch_size 4"
    two = f"--per_device_train_batch_size 2 --data_parallel 2 --pipeline_processes 1 --sharding {sharding}"
    train(files, tmp_path / "whole", 1, f"{base} {one}")
    train(files, tmp_path / "replicas", 2, f"{base} {two}")
    expected = weights(tmp_path / "whole" / "out")
    for source, processes, flags in (("whole", 2, two), ("replicas", 1, one)):
        checkpoint = tmp_path / source / "out" / "checkpoint-6"
        out = tmp_path / f"from-{source}"
        train(
            files, tmp_path / f"log-{source}", processes, f"{base} {flags} --resume_from_checkpoint {checkpoint}", out
        )
        got = weights(out)
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-5)


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "missing", "no manifest"])
def test_latest_falls_back_to_the_newest_whole_one(files: Path, interrupted: Path, tmp_path: Path, damage: str) -> None:
    part = interrupted / "checkpoint-6" / "stage-00001-of-00002.safetensors"
    content = bytearray(part.read_bytes())
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    elif damage == "cut short":
        part.write_bytes(content[:-10])
    elif damage == "missing":
        part.unlink()
    else:
        (interrupted / "checkpoint-6" / "manifest.json").unlink()
    log = train(files, tmp_path, 2, f"{BATCH} --resume_from_checkpoint latest", interrupted)
    assert "checkpoint-6" in log and "the checkpoint before it is tried" in log and "after step 3" in log
    assert same(interrupted, files / "whole" / "out")


def test_latest_without_any_begins_at_the_beginning(files: Path, tmp_path: Path) -> None:
    log = train(files, tmp_path, 2, f"{BATCH} --resume_from_checkpoint latest")
    assert "the run begins at step 1" in log
    assert same(tmp_path / "out", files / "whole" / "out")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--train_file {}/other.jsonl", "is of another run: the training rows"),
        ("--model_name_or_path {}/other", "is of another run: the model's config"),
        ("--per_device_train_batch_size 3", "is of another run: the rows of a step is 6, and was 4"),
        ("--seed 7", "is of another run: --seed is 7, and was 42"),
        ("--method frozen", "is of another run: --local_objective is 'none', and was 'reconstruction'"),
        ("--method e2e --split 2", "is of another run: --method is 'e2e', and was 'lopt'"),
        ("--max_steps 6", "has done 6 steps, and the run has 6"),
        ("--resume_from_checkpoint {}/nothing", "nothing is not a complete checkpoint: it has no manifest.json"),
    ],
)
def test_what_a_run_cannot_go_on_from(files: Path, tmp_path: Path, flags: str, error: str) -> None:
    write_rows(tmp_path / "other.jsonl", number=18, seed=5)
    write_model(tmp_path / "other", hidden_size=32)
    checkpoint = files / "whole" / "out" / "checkpoint-6"
    started = start(files, tmp_path, 1, f"{BATCH} --resume_from_checkpoint {checkpoint} {flags.format(tmp_path)}")
    assert started[0].process.exitcode == 1
    assert error in started[0].text and "Traceback" not in started[0].text


def test_another_number_of_stages_goes_on_from_the_weights(files: Path, tmp_path: Path) -> None:
    checkpoint = files / "whole" / "out" / "checkpoint-6"
    rates = "--learning_rate 0 --local_learning_rate 0 --weight_decay 0"
    log = train(files, tmp_path, 1, f"{BATCH} --num_stages 3 --resume_from_checkpoint {checkpoint} {rates}")
    assert "optimizer state and local heads start anew" in log
    assert "going on with another setting than before: --learning_rate is 0.0, and was 0.001" in log
    manifest = read_manifest(checkpoint)
    saved = {name: t for stage in (0, 1) for name, t in manifest.read_part(stage).items()}
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, saved[f"block.{name}"]), name


def test_machines_must_share_the_directory(files: Path, tmp_path: Path) -> None:
    """Two ranks with a directory each, as on two machines."""
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --max_steps 4 {BATCH}"
    given += " --save_steps 2"
    arguments = [[*given.split(), "--output_dir", str(tmp_path / f"machine-{rank}" / "out")] for rank in (0, 1)]
    with ranks(tmp_path, *arguments) as started:
        assert [rank.status(60) for rank in started] == [1, 1]
    assert "rank 1 does not share" in "".join(rank.text for rank in started)
    for own in arguments:
        own += ["--save_steps", "0"]
    with ranks(tmp_path, *arguments) as started:
        assert [rank.status(60) for rank in started] == [0, 0], started[0].text


def test_a_limit_removes_the_oldest(files: Path, tmp_path: Path) -> None:
    train(files, tmp_path, 1, f"{BATCH} --save_steps 2 --save_total_limit 2")
    assert [path.name for path in complete_checkpoints(tmp_path / "out")] == ["checkpoint-10", "checkpoint-8"]


def test_a_run_does_not_mix_its_checkpoints_with_another_ones(files: Path, interrupted: Path, tmp_path: Path) -> None:
    checkpoint = interrupted / "checkpoint-3"
    for flags in ("", f"--resume_from_checkpoint {checkpoint}"):
        started = start(files, tmp_path, 1, f"{BATCH} {flags}", interrupted)
        assert started[0].process.exitcode == 1
        assert "holds checkpoint-6 of an earlier run; --resume_from_checkpoint latest goes on" in started[0].text
    train(files, tmp_path, 1, f"{BATCH} --overwrite_output_dir true --save_steps 4 {flags}", interrupted)
    assert [path.name for path in complete_checkpoints(interrupted)] == [f"checkpoint-{step}" for step in (10, 8, 4, 3)]
    assert same(interrupted, files / "whole" / "out")


def test_a_model_that_is_no_run_of_ours_is_not_overwritten(files: Path, tmp_path: Path) -> None:
    out = shutil.copytree(files / "model", tmp_path / "out")
    started = start(files, tmp_path, 1, f"{BATCH} --resume_from_checkpoint latest", out)
    assert started[0].process.exitcode == 1
    assert "already holds a model" in started[0].text and not list(out.glob("checkpoint-*"))


def test_an_output_directory_that_is_removed_under_way_costs_what_was_in_it(files: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", f"{BATCH} --max_steps 400 --save_steps 20"
    arguments = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {out} {given}"
    with ranks(tmp_path, *[arguments.split()] * 2) as started:
        until(lambda: complete_checkpoints(out))
        shutil.rmtree(out, ignore_errors=True)
        assert [rank.status(120) for rank in started] == [0, 0], started[0].text
    assert weights(out)
    newest = read_manifest(complete_checkpoints(out)[0])
    for stage in (0, 1):
        newest.check_part(stage)


def test_export_makes_the_ordinary_model(files: Path, tmp_path: Path) -> None:
    """Of the weights after the checkpoint's step, as a run that ends there leaves them."""
    checkpoint, out = files / "whole" / "out" / "checkpoint-6", tmp_path / "exported"
    assert lopt_pp.cli.main(["export", str(checkpoint), str(out)]) == 0
    saved = {name: t for stage in (0, 1) for name, t in read_manifest(checkpoint).read_part(stage).items()}
    exported = AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, saved[f"block.{name}"]), name
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not list(out.glob("stage-*")) and not (out / "manifest.json").exists()


def test_export_refuses(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = shutil.copytree(files / "whole" / "out" / "checkpoint-6", tmp_path / "checkpoint-6")
    assert lopt_pp.cli.main(["export", str(checkpoint), str(files / "model")]) == 1
    assert "already holds a model" in capsys.readouterr().err
    part = checkpoint / "stage-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert lopt_pp.cli.main(["export", str(checkpoint), str(tmp_path / "out")]) == 1
    assert "it was cut short" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

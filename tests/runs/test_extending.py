"""The checkpoint at the last step, and a finished run that is given more steps."""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import COMMON, contents, train
from ranks import ranks
from results import weights
from tiny import InputsWith, write_rows

from lopt_pp.checkpoint import writer
from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.errors import LoptError

WARM = "--save_steps 4 --lr_scheduler_type constant_with_warmup --warmup_steps 7 --local_head_warmup_steps 2"
LATEST = "--resume_from_checkpoint latest"


@pytest.fixture(scope="module")
def inputs(inputs_with: InputsWith) -> Path:
    return inputs_with(rows=18, attention_dropout=0.1)


@pytest.fixture(scope="module")
def long(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run that was given 10 steps from the start."""
    out = tmp_path_factory.mktemp("long") / "out"
    assert train(inputs, out, f"{WARM} --max_steps 10")
    return out


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, heads and optimizer state."""
    manifest = read_manifest(checkpoint)
    parts = {spec.stage: manifest.read_part(spec.stage) for spec in manifest.specs}
    return {f"{stage} {name}": tensor for stage, part in parts.items() for name, tensor in part.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first and first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def names(out: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(out)]


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", [LATEST, "--resume_from_checkpoint {}/checkpoint-6"])
def test_the_bits_are_those_of_a_run_that_had_the_steps_from_the_start(
    inputs: Path, long: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    out = tmp_path / "out"
    assert train(inputs, out, f"{WARM} --max_steps 6")
    assert names(out) == ["checkpoint-6", "checkpoint-4"]
    before = weights(out)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        assert train(inputs, out, f"{WARM} --max_steps 10 {how.format(out)}")
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert "after step 6" in caplog.text and "the number of steps is 10, and was 6" in caplog.text
    assert same(weights(out), weights(long)) and not same(weights(out), before)
    assert same(state(out / "checkpoint-10"), state(long / "checkpoint-10"))
    assert steps(out) == steps(long) == [step for step in range(1, 11) for _ in (0, 1)]
    assert len({read_manifest(path).run_id for path in complete_checkpoints(out)}) == 1


def test_so_it_is_in_two_processes(inputs: Path, long: Path, tmp_path: Path) -> None:
    given = (
        f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {tmp_path / 'out'}"
    )
    for more in ("--max_steps 6", f"--max_steps 10 {LATEST}"):
        with ranks(tmp_path, *[f"{given} {COMMON} {WARM} {more}".split()] * 2) as started:
            assert [rank.status(60) for rank in started] == [0, 0], started[0].text
    assert same(weights(tmp_path / "out"), weights(long))
    assert same(state(tmp_path / "out" / "checkpoint-10"), state(long / "checkpoint-10"))


@pytest.mark.parametrize(
    ("schedule", "is_named"),
    [
        ("linear", True),
        ("cosine --warmup_steps 2", True),
        ("constant_with_warmup --warmup_ratio 0.5", True),
        ("constant --warmup_ratio 0.5", False),
        ("inverse_sqrt --warmup_steps 2", False),
    ],
)
def test_other_schedules_follow_the_new_length_and_are_named(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: str, is_named: bool
) -> None:
    given = f"--lr_scheduler_type {schedule}"
    assert train(inputs, tmp_path, f"{given} --max_steps 2")
    assert train(inputs, tmp_path, f"{given} --max_steps 4 {LATEST}")
    said = f"the number of steps is 4, and was 2; --lr_scheduler_type {schedule.split()[0]} follows the new number"
    assert (said in caplog.text) == is_named
    if schedule == "linear":
        rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert rates[1::2] == pytest.approx([1e-3, 5e-4, 5e-4, 2.5e-4])
    elif not is_named:
        assert train(inputs, tmp_path / "long", f"{given} --max_steps 4")
        assert same(weights(tmp_path), weights(tmp_path / "long"))


def test_a_finished_run_says_so_and_changes_nothing(
    inputs: Path, long: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(long, tmp_path / "out")
    before = contents(out)
    with caplog.at_level(logging.INFO):
        assert train(inputs, out, f"{WARM} --max_steps 10 {LATEST}")
    assert f"the run is finished: {out} has its model, after 10 steps; a larger --max_steps or" in caplog.text
    assert "going on" not in caplog.text
    assert contents(out) == before
    with pytest.raises(LoptError, match="checkpoint-10 has done 10 steps, and the run has 8; with more"):
        train(inputs, out, f"{WARM} --max_steps 8 {LATEST}")
    with pytest.raises(LoptError, match="already holds a model"):
        train(inputs, out, f"{WARM} --max_steps 12")
    assert contents(out) == before


def test_epochs_can_be_more_as_well(inputs: Path, tmp_path: Path) -> None:
    """18 rows in 9 steps; streamed rows go on where they were."""
    given = "--streaming --shuffle_dataset false --save_steps 100"
    assert train(inputs, tmp_path / "out", f"{given} --max_steps 9")
    assert train(inputs, tmp_path / "out", f"{given} --max_steps 12 {LATEST}")
    assert train(inputs, tmp_path / "long", f"{given} --max_steps 12")
    assert same(weights(tmp_path / "out"), weights(tmp_path / "long"))
    assert train(inputs, tmp_path / "epochs", "--num_train_epochs 1")
    assert train(inputs, tmp_path / "epochs", f"--num_train_epochs 1.5 {LATEST}")
    assert names(tmp_path / "epochs") == ["checkpoint-14", "checkpoint-9"]


def test_no_checkpoints_are_none_at_all(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train(inputs, tmp_path, "--save_steps 0 --max_steps 2")
    assert names(tmp_path) == []
    with caplog.at_level(logging.INFO):
        assert train(inputs, tmp_path, f"--save_steps 0 --max_steps 2 {LATEST}")
    assert "the run is finished" in caplog.text
    with pytest.raises(LoptError, match="the run's model after 2 steps, and it has no checkpoint to go on from; give"):
        train(inputs, tmp_path, f"--save_steps 0 --max_steps 4 {LATEST}")


def test_a_model_that_was_not_saved_whole_is_saved_without_a_step(inputs: Path, long: Path, tmp_path: Path) -> None:
    out = shutil.copytree(long, tmp_path / "out")
    for path in out.glob("*.safetensors*"):
        path.unlink()
    before = contents(out / "checkpoint-10")
    assert train(inputs, out, f"{WARM} --max_steps 10 {LATEST}")
    assert same(weights(out), weights(long)) and steps(out) == steps(long)
    assert contents(out / "checkpoint-10") == before, "it was saved once more"


def test_a_disk_that_is_full_for_the_last_checkpoint_does_not_cost_the_model(
    inputs: Path, long: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save = writer.save_file

    def full(tensors: Any, path: Path) -> None:
        if "checkpoint-10" in str(path):
            assert weights(tmp_path), "the model was to come first"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(writer, "save_file", full)
    assert train(inputs, tmp_path, f"{WARM} --max_steps 10")
    assert same(weights(tmp_path), weights(long)) and names(tmp_path) == ["checkpoint-8", "checkpoint-4"]
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "no checkpoint at step 10" in said and "No space left" in said and "the next" not in said
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_run_that_keeps_its_best_model_goes_on_from_its_last_step(inputs: Path, tmp_path: Path) -> None:
    """Its checkpoint has what the last step has left, and its model what the best one had."""
    held = write_rows(tmp_path / "held.jsonl", number=6, seed=9)
    out = tmp_path / "out"
    given = f"{WARM} --eval_file {held} --eval_steps 2 --load_best_model_at_end"
    given += " --learning_rate 0.3 --save_total_limit 1"
    assert train(inputs, out, f"{given} --max_steps 6")
    best = min(complete_checkpoints(out), key=lambda path: read_manifest(path).eval_loss or 0)
    assert best.name == "checkpoint-4" and names(out) == ["checkpoint-6", "checkpoint-4"]
    last = {name.split(" ")[1]: tensor for name, tensor in state(out / "checkpoint-6").items()}
    assert not all(torch.equal(last[f"block.{name}"], tensor) for name, tensor in weights(out).items())
    assert train(inputs, out, f"{given} --max_steps 10 {LATEST}")
    assert train(inputs, tmp_path / "long", f"{given} --max_steps 10")
    assert same(state(out / "checkpoint-10"), state(tmp_path / "long" / "checkpoint-10"))


def test_a_run_that_has_lost_its_directory_publishes_nothing(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lopt_pp.training.checkpointing import Checkpointer

    def after_step(self: Checkpointer, steps_done: int, saves: Callable[..., None] = Checkpointer.after_step) -> None:
        if steps_done == 3:
            self.join()  # The checkpoint of step 2 is in its place.
            (tmp_path / ".lock-9").write_text("of another run")
        saves(self, steps_done)

    monkeypatch.setattr(Checkpointer, "after_step", after_step)
    with pytest.raises(LoptError, match="was taken by another run while this one did not answer"):
        train(inputs, tmp_path, "--save_steps 2 --max_steps 6")
    assert names(tmp_path) == ["checkpoint-2"] and not list(tmp_path.glob("model*"))
    assert (tmp_path / ".lock-9").exists() and not (tmp_path / ".lock-1").exists()

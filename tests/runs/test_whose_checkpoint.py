"""Whose a checkpoint is: only damage makes a run pass over one, and no run touches another one's."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from in_process import contents, rewrite_manifest, train
from results import weights
from tiny import InputsWith

from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import STOPPED, complete_checkpoints
from lopt_pp.errors import LoptError

LATEST = "--max_steps 6 --save_steps 2 --resume_from_checkpoint latest"
OTHER = "b" * 32


@pytest.fixture(scope="module")
def inputs(inputs_with: InputsWith) -> Path:
    return inputs_with(rows=18, attention_dropout=0.1)


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run that nothing happened to, with checkpoints after 2, 4 and 6 steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train(inputs, out, "--max_steps 6 --save_steps 2")
    return out


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The output directory of the same run, had it ended after 5 steps."""
    out = shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("model*", "checkpoint-6"))
    (out / STOPPED).write_text("{}")
    (out / "config.json").unlink()
    return out


def refused(inputs: Path, out: Path, flags: str, **world: object) -> str:
    """The error of a run that must leave all as it is."""
    before = contents(out)
    with pytest.raises(LoptError) as error:
        train(inputs, out, flags, **world)
    assert contents(out) == before
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        ("--per_device_train_batch_size 4", "the rows of a step is 4, and was 2"),
        ("--seed 7", "--seed is 7, and was 42"),
        ("--train_file {}", "the training rows (sha256) is "),
        ("--max_steps 3", "checkpoint-4 has done 4 steps, and the run has 3; with more (--max_steps or"),
        ("--seed 7 --overwrite_output_dir", "--seed is 7, and was 42"),
        ("--seed 7 --save_total_limit 1", "--seed is 7, and was 42"),
    ],
)
def test_another_run_ends_with_an_error_and_all_stays(
    inputs: Path, stopped: Path, tmp_path: Path, flags: str, difference: str
) -> None:
    edited = tmp_path / "edited.jsonl"
    edited.write_text((inputs / "rows.jsonl").read_text().replace("what is", "tell me", 1))
    said = refused(inputs, stopped, f"{LATEST} {flags.format(edited)}")
    assert difference in said and "checkpoint-4" in said
    assert "max_steps" in flags or "; give the flags and rows as they were, or another --output_dir" in said
    # Nor does damage to the newest lead to one of another run.
    (stopped / "checkpoint-4" / "manifest.json").write_bytes(b"{")
    if "max_steps" not in flags:
        assert difference in refused(inputs, stopped, f"{LATEST} {flags.format(edited)}")


def test_what_is_not_a_checkpoint_of_ours_is_not_passed_over(inputs: Path, stopped: Path) -> None:
    """Such as one of transformers' Trainer, or of a later version of this package, or what may not be read."""
    foreign = stopped / "checkpoint-500"
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    assert "checkpoint-500 is not a complete checkpoint" in refused(inputs, stopped, LATEST)
    shutil.rmtree(foreign)
    rewrite_manifest(stopped / "checkpoint-4", format=3)
    assert "has the format 3, and this version reads 1 and 2" in refused(inputs, stopped, LATEST)


def test_where_none_is_whole_the_run_does_not_begin_anew(inputs: Path, stopped: Path) -> None:
    for step in (2, 4):
        next((stopped / f"checkpoint-{step}").glob("stage-*")).write_bytes(b"")
    assert "is whole; give another --output_dir, or --overwrite_output_dir" in refused(inputs, stopped, LATEST)


def test_a_damaged_one_gives_way_to_one_of_the_same_run_only(inputs: Path, stopped: Path, whole: Path) -> None:
    next((stopped / "checkpoint-4").glob("stage-*")).unlink()
    rewrite_manifest(stopped / "checkpoint-2", run_id=OTHER)
    assert "checkpoint-2 is of another run than the damaged" in refused(inputs, stopped, LATEST)
    rewrite_manifest(stopped / "checkpoint-2", run_id=read_manifest(whole / "checkpoint-2").run_id)
    assert train(inputs, stopped, LATEST)
    assert weights(stopped).keys() == weights(whole).keys()
    assert all((weights(stopped)[name] == tensor).all() for name, tensor in weights(whole).items())


def test_a_run_keeps_its_id_and_others_have_others(inputs: Path, stopped: Path, whole: Path, tmp_path: Path) -> None:
    (run_id,) = {read_manifest(path).run_id for path in complete_checkpoints(whole)}
    assert run_id is not None
    assert train(inputs, stopped, LATEST)
    assert {read_manifest(path).run_id for path in complete_checkpoints(stopped)} == {run_id}
    assert json.loads((stopped / "run.json").read_text())["run_id"] == run_id
    assert train(inputs, tmp_path / "other", "--max_steps 2")
    assert read_manifest(tmp_path / "other" / "checkpoint-2").run_id != run_id


def test_checkpoints_without_an_id_are_gone_on_from(inputs: Path, stopped: Path, whole: Path) -> None:
    for step in (2, 4):
        rewrite_manifest(stopped / f"checkpoint-{step}", run_id=None, committed=None)
    assert train(inputs, stopped, f"{LATEST} --save_total_limit 1")
    assert weights(stopped).keys() == weights(whole).keys()
    assert all((weights(stopped)[name] == tensor).all() for name, tensor in weights(whole).items())
    assert read_manifest(stopped / "checkpoint-6").run_id is not None
    assert [path.name for path in complete_checkpoints(stopped)] == [f"checkpoint-{step}" for step in (6, 4, 2)]


def test_the_limit_counts_this_runs_in_the_order_of_their_commits(inputs: Path, stopped: Path) -> None:
    """A damaged one of more steps is older, and one of another run is nobody's to remove."""
    shutil.copytree(stopped / "checkpoint-2", stopped / "checkpoint-50")
    rewrite_manifest(stopped / "checkpoint-50", run_id=OTHER, committed=1.0, step=50)
    next((stopped / "checkpoint-4").glob("stage-*")).write_bytes(b"")
    assert train(inputs, stopped, f"{LATEST} --save_steps 3 --save_total_limit 2")
    assert [path.name for path in complete_checkpoints(stopped)] == [f"checkpoint-{step}" for step in (50, 6, 3)]


def test_one_that_is_removed_half_way_is_in_nobodys_way(
    inputs: Path, stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed while it removes one, and what says whose it is was the first to go."""

    def killed(path: Path, **given: object) -> None:
        for file in (*path.glob("stage-*"), *path.glob("manifest.json")):
            file.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        assert train(inputs, stopped, f"{LATEST} --save_total_limit 1")
    assert [path.name for path in complete_checkpoints(stopped)] == ["checkpoint-6"]
    assert train(inputs, stopped, LATEST.replace("6", "7", 1))
    assert not [path.name for path in stopped.iterdir() if "unfinished" in path.name]
    assert [path.name for path in complete_checkpoints(stopped)] == ["checkpoint-7", "checkpoint-6"]


def test_the_newest_is_the_one_that_was_committed_last(
    inputs: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite_manifest(stopped / "checkpoint-4", committed=1.0)
    with caplog.at_level(logging.INFO):
        assert train(inputs, stopped, LATEST)
    assert f"going on from {stopped / 'checkpoint-2'}, after step 2" in caplog.text
    moments = [read_manifest(path).committed for path in complete_checkpoints(stopped)]
    assert None not in moments and moments == sorted(moments, reverse=True)  # type: ignore[type-var]


def test_a_clock_that_was_set_back_does_not_make_it_older(
    inputs: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = read_manifest(stopped / "checkpoint-4").committed
    assert last is not None
    monkeypatch.setattr("lopt_pp.checkpoint.committer.time.time", lambda: last - 3600)
    assert train(inputs, stopped, f"{LATEST} --save_total_limit 1")
    assert [path.name for path in complete_checkpoints(stopped)] == ["checkpoint-6"]


def test_a_model_that_has_moved_is_the_same_model(
    inputs: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = shutil.copytree(inputs / "model", tmp_path / "moved" / "model")
    with caplog.at_level(logging.WARNING):
        assert train(inputs, stopped, f"{LATEST} --model_name_or_path {moved}")
    assert "setting" not in caplog.text
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    (stopped / "model.safetensors.index.json").unlink()
    said = refused(inputs, stopped, f"{LATEST} --model_name_or_path {moved}")
    assert "the model's config is {'rms_norm_eps': 0.001}, and was {'rms_norm_eps': 1e-06}" in said


def test_a_restart_of_torchrun_goes_on_from_its_own_only(
    inputs: Path, stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first start has been refused, or ended before it removed what --overwrite_output_dir lets it remove."""
    given = "--max_steps 6 --save_steps 2"
    assert "holds checkpoint-4 of an earlier run" in refused(inputs, stopped, given, restart=1)
    run_id = read_manifest(stopped / "checkpoint-4").run_id
    with caplog.at_level(logging.INFO):
        assert train(inputs, stopped, f"{given} --overwrite_output_dir", restart=1)
    assert "the run begins at step 1" in caplog.text
    assert run_id not in {read_manifest(path).run_id for path in complete_checkpoints(stopped)}


def test_a_restart_of_torchrun_finds_its_own(inputs: Path, stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_id = read_manifest(stopped / "checkpoint-4").run_id
    with caplog.at_level(logging.INFO):
        assert train(inputs, stopped, "--max_steps 6 --save_steps 2", restart=1, launch=run_id)
    assert "after step 4" in caplog.text
    assert {read_manifest(path).run_id for path in complete_checkpoints(stopped)} == {run_id}


def test_two_runs_one_after_another(inputs: Path, stopped: Path) -> None:
    """The second replaces the first; where it was stopped it goes on as itself, and not over the first one's model."""
    assert train(inputs, stopped, LATEST)
    first = read_manifest(stopped / "checkpoint-6").run_id
    assert train(inputs, stopped, "--max_steps 6 --save_steps 2 --seed 7 --overwrite_output_dir")
    second = {read_manifest(path).run_id for path in complete_checkpoints(stopped)}
    assert len(second) == 1 and first not in second
    assert "--seed is 42, and was 7" in refused(inputs, stopped, LATEST)
    # As it was while the second had not yet come to its end.
    index = stopped / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["metadata"]["lopt_pp_run_id"] = first
    index.write_text(json.dumps(content))
    assert "holds the model of another run" in refused(inputs, stopped, f"{LATEST} --seed 7")
    assert train(inputs, stopped, f"{LATEST} --seed 7 --overwrite_output_dir")

"""Held-out rows during a run: what is measured is the model, and training does not notice."""

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from evaluated import (
    HEARD_AT,
    LAYOUTS,
    MEASURED,
    eval_losses,
    flags,
    plain_loss,
    plain_metrics,
    records,
    run_of,
    same,
    train,
    train_layouts,
    write_files,
)
from finishing import waiting_to_be_heard
from ranks import ranks, until
from results import weights
from tiny import write_model

from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.errors import LoptError
from lopt_pp.metrics.progress import EVALUATING
from lopt_pp.train import STOPPED_STATUS

LONGER = "--max_steps 8 --resume_from_checkpoint latest"

BEST = "--load_best_model_at_end true --save_steps 2 --save_total_limit 1 --learning_rate 1e-2"

BEST_LAYOUTS = ("one process", "three stages on two", "sharded", "end to end")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, rows to train on, rows to measure, and every layout's run with and without them."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_files(folder)

    def kinds(layout: str) -> dict[str, str]:
        found = {"without": "", "with": f"{MEASURED} --eval_file {folder / 'held_out.jsonl'}"}
        if layout in BEST_LAYOUTS:
            found["best"] = f"{MEASURED} --eval_file {folder / 'odd.jsonl'} {BEST}"
            sets = f"--eval_file usual={folder / 'held_out.jsonl'} odd={folder / 'odd.jsonl'}"
            chosen = "--metric_for_best_model odd_loss --early_stopping_patience 1 --max_steps 40 --eval_on_start"
            chosen += " --eval_metrics mean_token_accuracy entropy --compute_metrics own_metrics:totals"
            found["stopped"] = f"{MEASURED} {sets} {BEST} {chosen} --save_strategy best"
        return found

    train_layouts(folder, LAYOUTS, kinds)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_notice(files: Path, layout: str) -> None:
    assert same(weights(run_of(files, "with", layout)), weights(run_of(files, "without", layout)))
    first, second = (
        [(r["step"], r["stage"], r.get("loss"), r.get("reconstruction_loss"), r.get("grad_norm")) for r in records(out)]
        for out in (run_of(files, "with", layout), run_of(files, "without", layout))
    )
    assert first == second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_loss_is_the_whole_models(files: Path, layout: str) -> None:
    out = run_of(files, "with", layout)
    losses = eval_losses(out)
    assert list(losses) == [2, 4, 6]
    tolerance = 2e-2 if "bfloat16" in layout else 1e-5
    assert losses[6] == pytest.approx(plain_loss(out, files / "held_out.jsonl"), rel=tolerance)
    for record in records(out):
        is_last = record["stage"] == max(r["stage"] for r in records(out))
        assert ("eval_perplexity" in record) == ("eval_loss" in record) == (is_last and record["step"] % 2 == 0)
        assert (record["eval_seconds"] > 0) == (record["step"] % 2 == 0)
        for name in ("reconstruction_loss", "auxiliary_loss"):
            assert (f"eval_{name}" in record) == (name in record and record["step"] % 2 == 0)
        if "eval_loss" in record:
            assert record["eval_perplexity"] == pytest.approx(math.exp(record["eval_loss"]))


def test_all_layouts_measure_the_same(files: Path) -> None:
    def measured(layout: str) -> list[float]:
        names = ("eval_reconstruction_loss", "eval_loss")
        return [record[name] for record in records(run_of(files, "with", layout)) for name in names if name in record]

    one = measured("one process")
    assert len(one) == 6 and measured("two processes") == one


def test_unlearned_rows_measure_what_the_step_measures(files: Path, tmp_path: Path) -> None:
    """With a rate of 0 and the training rows themselves, without dropout, both losses are those of the step."""
    write_model(tmp_path / "model")
    more = f"--model_name_or_path {tmp_path / 'model'} --eval_file {files / 'rows.jsonl'} --learning_rate 0"
    more += " --per_device_train_batch_size 37 --gradient_accumulation_steps 1 --max_steps 1 --eval_steps 0"
    train(flags(files, tmp_path / "out", more))
    first, last = records(tmp_path / "out")
    assert first["eval_reconstruction_loss"] == pytest.approx(first["reconstruction_loss"], rel=1e-5)
    assert last["eval_loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_the_log_has_a_line_for_each_evaluation(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the progress bar hears of each microbatch."""
    caplog.set_level("INFO", logger="lopt_pp")
    heard: list[tuple[int, int]] = []
    monkeypatch.setattr(EVALUATING, "done", lambda number, total: heard.append((number, total)))
    more = "--eval_split_size 5 --per_device_eval_batch_size 2 --eval_steps 4 --logging_steps 100"
    train(flags(files, tmp_path / "out", more))
    assert heard == 2 * [(1, 3), (2, 3), (3, 3)]
    assert (
        f"37 rows of {files / 'rows.jsonl'}: 32 used, 5 left out (5 held out by --eval_split_size)" in caplog.messages
    )
    lines = [re.fullmatch(r"step (\d+)/6: eval loss [\d.]+, perplexity [\d.]+", line) for line in caplog.messages]
    assert [int(match[1]) for match in lines if match] == [4, 6]
    assert any(re.match("stage 1: .*% evaluating$", line) for line in caplog.messages)
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\nLoss on 5 held-out rows: [\d.]+ \(perplexity [\d.]+\)\n", card)


def test_epochs_are_counted_in_steps(files: Path, tmp_path: Path) -> None:
    """37 rows are 7 steps of an epoch; the first that is evaluated is the second, and the last step is as ever."""
    more = f"--eval_file {files / 'held_out.jsonl'} --eval_strategy epoch --eval_delay 1.5 --save_strategy epoch"
    train(flags(files, tmp_path / "out", f"{more} --load_best_model_at_end --num_stages 2 --max_steps 23"))
    assert [*eval_losses(tmp_path / "out")] == [14, 21, 23]
    steps = {int(path.name.removeprefix("checkpoint-")) for path in complete_checkpoints(tmp_path / "out")}
    assert steps == {7, 14, 21, 23}


def test_a_run_that_goes_on_measures_the_same(files: Path, tmp_path: Path) -> None:
    more = f"{MEASURED} --eval_split_size 0.2 --save_steps 3"
    train(flags(files, tmp_path / "whole", more))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    train(flags(files, tmp_path / "out", f"{more} --resume_from_checkpoint latest"))
    assert eval_losses(tmp_path / "out") == {
        step: loss for step, loss in eval_losses(tmp_path / "whole").items() if step > 3
    }
    with pytest.raises(LoptError, match="is of another run: --eval_split_size is 0.1, and was 0.2"):
        checkpoint = tmp_path / "whole" / "checkpoint-3"
        train(
            flags(files, tmp_path / "new", f"{more} --eval_split_size 0.1 --resume_from_checkpoint {checkpoint}"),
        )


def test_a_run_that_is_stopped(files: Path, tmp_path: Path) -> None:
    """Three stages in three processes, stopped while they run ahead of each other, end after the same step."""
    more = f"--num_stages 3 --queue_depth 5 --eval_steps 3 --eval_file {files / 'held_out.jsonl'} --max_steps 200"
    arguments = flags(files, tmp_path / "out", more)
    with ranks(tmp_path / "first", *[arguments] * 3) as started:
        until(lambda: "step 3/200: eval loss" in started[0].text)
        started[0].kill(signal.SIGTERM)
        assert [rank.status(60) for rank in started] == [STOPPED_STATUS] * 3, "".join(rank.text for rank in started)
    (checkpoint,) = complete_checkpoints(tmp_path / "out")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 3 <= step < 200 and max(record["step"] for record in records(tmp_path / "out")) == step
    assert read_manifest(checkpoint).eval_loss == eval_losses(tmp_path / "out").get(step)
    train([*arguments, "--resume_from_checkpoint", "latest", "--max_steps", str(step + 2), "--eval_steps", "0"])
    assert [*eval_losses(tmp_path / "out")][-1] == step + 2


@pytest.mark.parametrize("layout", BEST_LAYOUTS)
def test_the_best_model_is_saved(files: Path, layout: str) -> None:
    """Here the first that was measured; the limit of one checkpoint has left it, and the newest."""
    out = run_of(files, "best", layout)
    losses = eval_losses(out)
    assert losses[2] < losses[4] < losses[6]
    assert [path.name for path in complete_checkpoints(out)] == ["checkpoint-6", "checkpoint-2"]
    manifest = read_manifest(out / "checkpoint-2")
    assert manifest.eval_loss == losses[2]
    assert same(weights(out), saved_weights(out / "checkpoint-2"))
    assert plain_loss(out, files / "odd.jsonl") == pytest.approx(losses[2], rel=1e-5)
    card = (out / "README.md").read_text()
    assert "Optimizer steps: 6; these are the weights after 2, whose loss on held-out rows was the lowest\n" in card
    assert f"Loss on 10 held-out rows: {losses[2]:.4g}" in card


@pytest.mark.parametrize("layout", BEST_LAYOUTS)
def test_several_sets_are_measured_each_by_itself(files: Path, layout: str) -> None:
    """The model that is saved is that of step 2; records and manifests have what each set says of it."""
    out = run_of(files, "stopped", layout)
    last = {row["step"]: row for row in records(out) if "eval_odd_loss" in row}
    assert "eval_loss" not in (out / "metrics.jsonl").read_text()
    for name, file in (("odd", "odd.jsonl"), ("usual", "held_out.jsonl")):
        assert last[2][f"eval_{name}_loss"] == pytest.approx(plain_loss(out, files / file), rel=1e-5)
        assert last[2][f"eval_{name}_perplexity"] == pytest.approx(math.exp(last[2][f"eval_{name}_loss"]))
    local = {name for row in records(out) for name in row if name.endswith("reconstruction_loss")}
    expected = {"reconstruction_loss", "eval_odd_reconstruction_loss", "eval_usual_reconstruction_loss"}
    assert local == (set() if layout == "end to end" else expected)
    metrics = read_manifest(out / "checkpoint-2").metrics
    assert metrics == {name: last[2][name] for name in last[2] if name.startswith("eval_") and name != "eval_seconds"}


@pytest.mark.parametrize("layout", BEST_LAYOUTS)
def test_single_tokens_are_measured(files: Path, layout: str) -> None:
    """By names of ours and by a function of the user's own, which sees the rows in the order of the file."""
    out = run_of(files, "stopped", layout)
    (record,) = (row for row in records(out) if row["step"] == 2 and "eval_odd_loss" in row)
    for name, file in (("odd", "odd.jsonl"), ("usual", "held_out.jsonl")):
        expected, num_targets = plain_metrics(out, files / file)
        for metric, value in expected.items():
            assert record[f"eval_{name}_{metric}"] == pytest.approx(value, rel=1e-4), metric
        assert record[f"eval_{name}_mean_token_accuracy"] == pytest.approx(expected["right"] / num_targets)
    assert not any("right" in name for row in records(out) if row["stage"] == 0 for name in row)


@pytest.mark.parametrize("layout", BEST_LAYOUTS)
def test_a_run_finishes_when_its_model_gets_no_better(files: Path, layout: str) -> None:
    """After the second evaluation; the one before the first step is not of the run, and does not count."""
    out = run_of(files, "stopped", layout)
    steps = records(out)[-1]["step"]
    evaluated = [row["step"] for row in records(out) if "eval_odd_loss" in row]
    assert steps > 4 and evaluated == [*range(0, steps, 2), steps]
    # By --save_strategy best there is nothing else, but for the last step.
    assert [path.name for path in complete_checkpoints(out)] == [f"checkpoint-{steps}", "checkpoint-2"]
    assert not list(out.glob("*.unfinished"))
    assert same(weights(out), saved_weights(out / "checkpoint-2"))
    card = (out / "README.md").read_text()
    assert f"Optimizer steps: {steps} of 40; finished early: eval_odd_loss has not improved for " in card
    assert "; these are the weights after 2, which were the best on held-out rows by odd_loss\n" in card
    assert all(f"held-out rows ({name}): " in card for name in ("odd", "usual"))


def test_a_run_that_goes_on_counts_what_it_had_measured(files: Path, tmp_path: Path) -> None:
    """Here its file of metrics has one evaluation that is worse; with patience for two, the next is one too many."""
    out, before = tmp_path / "out", run_of(files, "stopped", "one process")
    shutil.copytree(before / "checkpoint-2", out / "checkpoint-2")
    lines = [line for line in (before / "metrics.jsonl").read_text().splitlines(True) if json.loads(line)["step"] <= 2]
    better = json.dumps({"step": 1, "stage": 1, "eval_odd_loss": 0.5}) + "\n"
    (out / "metrics.jsonl").write_text("".join([better, *lines]))
    sets = f"--eval_file usual={files / 'held_out.jsonl'} odd={files / 'odd.jsonl'} --resume_from_checkpoint latest"
    more = f"{MEASURED} {sets} --learning_rate 1e-2 --metric_for_best_model eval_odd_loss --max_steps 40"
    with waiting_to_be_heard(HEARD_AT):
        train(flags(files, out, f"{more} --early_stopping_patience 2 --num_stages 2"))
    card = (out / "README.md").read_text()
    assert "eval_odd_loss has not improved for 2 evaluations; the best was 0.5 after step 1\n" in card


def test_metrics_that_nobody_measures(files: Path, tmp_path: Path) -> None:
    sets = f"--eval_file a={files / 'held_out.jsonl'} b={files / 'odd.jsonl'} --save_steps 500"
    with pytest.raises(LoptError, match="^--load_best.* needs --metric_for_best_model: one of eval_a_loss, "):
        train(flags(files, tmp_path / "out", f"{sets} --load_best_model_at_end"))
    with pytest.raises(LoptError, match="^--metric_for_best_model loss: nothing of that name is measured; give one "):
        train(flags(files, tmp_path / "out", f"{sets} --metric_for_best_model loss"))
    taken = f"--eval_file reconstruction={files / 'odd.jsonl'}"
    with pytest.raises(LoptError, match="^--eval_file reconstruction=.*: a stage's loss is called reconstruction_loss"):
        train(flags(files, tmp_path / "out", taken))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(checkpoint)
    parts = [manifest.read_part(spec.stage, "block.") for spec in manifest.specs]
    return {name.removeprefix("block."): tensor for part in parts for name, tensor in part.items()}


def test_a_run_that_goes_on_knows_the_best_from_before(files: Path, tmp_path: Path) -> None:
    """In another layout than the checkpoints are of."""
    out = tmp_path / "out"
    for step in (2, 6):
        shutil.copytree(run_of(files, "best", "three stages on two") / f"checkpoint-{step}", out / f"checkpoint-{step}")
    before = saved_weights(out / "checkpoint-2")
    train(flags(files, out, f"{MEASURED} --eval_file {files / 'odd.jsonl'} {BEST} {LONGER}"))
    assert same(weights(out), before)


def test_a_best_checkpoint_that_is_damaged_costs_only_itself(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lopt_pp")
    out = tmp_path / "out"
    for step in (2, 6):
        shutil.copytree(run_of(files, "best", "one process") / f"checkpoint-{step}", out / f"checkpoint-{step}")
    part = out / "checkpoint-2" / "stage-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    before = saved_weights(out / "checkpoint-6")
    train(flags(files, out, f"{MEASURED} --eval_file {files / 'odd.jsonl'} {BEST} {LONGER}"))
    assert any("it was cut short; the next best model is taken" in line for line in caplog.messages)
    assert same(weights(out), before)


def test_the_last_model_may_be_the_best(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lopt_pp")
    train(flags(files, tmp_path / "out", f"{MEASURED} --eval_file {files / 'held_out.jsonl'} {BEST}"))
    losses = eval_losses(tmp_path / "out")
    assert losses[6] == min(losses.values())
    assert any("the model after the last step is the best" in line for line in caplog.messages)
    assert plain_loss(tmp_path / "out", files / "held_out.jsonl") == pytest.approx(losses[6], rel=1e-5)
    assert "Optimizer steps: 6\n" in (tmp_path / "out" / "README.md").read_text()

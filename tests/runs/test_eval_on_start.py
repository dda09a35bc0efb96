"""The evaluation before the first step: what is measured is the pretrained model, and training does not notice."""

import math
import shutil
import signal
from pathlib import Path

import evaluated
import pytest
import torch.distributed as dist
from evaluated import (
    COMMON,
    MEASURED,
    eval_losses,
    flags,
    plain_loss,
    records,
    run_of,
    same,
    train,
    train_layouts,
    write_files,
)
from ranks import ranks, until
from results import weights
from stores import clone
from synthetic_runs import record

from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.shutdown import StopCoordinator, ask_to_stop
from lopt_pp.errors import LoptError
from lopt_pp.metrics.collector import Collector, post, post_end
from lopt_pp.report.harm import harm
from lopt_pp.report.run_data import read_run
from lopt_pp.train import STOPPED_STATUS
from lopt_pp.training.step_plan import START

# The kinds of loop, and of joining what is measured.
NAMES = ("one process", "two processes", "three stages on two", "sharded", "end to end", "end to end, one process")
LAYOUTS = {name: evaluated.LAYOUTS[name] for name in NAMES}
OF_TRAINING = {"loss", "reconstruction_loss", "learning_rate", "grad_norm"}
OF_THE_PROBE = {"drift_norm", "drift_cosine"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and every layout's run without an evaluation and with one at its start."""
    folder = tmp_path_factory.mktemp("start")
    write_files(folder)
    # A checkpoint is due when 2 steps are done, and none when 0 are.
    kinds = {"without": "", "with": f"{MEASURED} --eval_file {folder / 'held_out.jsonl'} --eval_on_start"}
    train_layouts(folder, LAYOUTS, lambda _: {kind: f"--save_steps 2 {more}" for kind, more in kinds.items()})
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_notice(files: Path, layout: str) -> None:
    assert same(weights(run_of(files, "with", layout)), weights(run_of(files, "without", layout)))
    names = {"step", "stage", "epoch", "num_tokens", "num_targets"} | OF_TRAINING | OF_THE_PROBE
    first, second = (
        [{name: r[name] for name in names & r.keys()} for r in records(run_of(files, kind, layout)) if r["step"] > 0]
        for kind in ("with", "without")
    )
    assert first == second
    assert [path.name for path in complete_checkpoints(run_of(files, "with", layout))] == [
        "checkpoint-6",
        "checkpoint-4",
        "checkpoint-2",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pretrained_model_is_measured(files: Path, layout: str) -> None:
    """As step 0, in records that have all that those of other evaluations have, but for what training makes."""
    measured = records(run_of(files, "with", layout))
    stages = sorted({r["stage"] for r in measured})
    by_place = {(r["step"], r["stage"]): r for r in measured}
    assert [*by_place][: len(stages)] == [(0, stage) for stage in stages] and len(by_place) == len(measured)
    assert [*eval_losses(run_of(files, "with", layout))] == [0, 2, 4, 6]
    for stage in stages:
        start, later = by_place[0, stage], by_place[2, stage]
        assert later.keys() - start.keys() <= OF_TRAINING | OF_THE_PROBE and start.keys() <= later.keys()
        assert OF_TRAINING.isdisjoint(start) and start["eval_seconds"] > 0 and start["step_seconds"] > 0
        assert (start["num_tokens"], start["num_targets"], start["epoch"], start["tokens_per_second"]) == (0, 0, 0, 0)
    last = by_place[0, stages[-1]]
    assert last["eval_loss"] == pytest.approx(plain_loss(files / "model", files / "held_out.jsonl"), rel=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))


def test_two_processes_measure_the_bits_of_one(files: Path) -> None:
    def measured(layout: str) -> list[float]:
        names = ("eval_reconstruction_loss", "eval_loss")
        return [r[name] for r in records(run_of(files, "with", layout)) for name in names if name in r]

    assert len(measured("one process")) == 8 and measured("two processes") == measured("one process")


def test_a_run_that_goes_on_has_its_start_behind_it(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And still knows of it at its end: the more these rows' model learns, the worse it gets on them."""
    caplog.set_level("INFO", logger="lopt_pp")
    given = f"--eval_file {files / 'odd.jsonl'} --eval_steps 0 --eval_on_start --save_steps 3"
    whole, out = tmp_path / "whole", tmp_path / "out"
    train(flags(files, whole, given))
    losses = eval_losses(whole)
    assert [*losses] == [0, 6] and losses[0] < losses[6]
    assert any(line.startswith(f"step 0/6: eval loss {losses[0]:.4g}, perplexity") for line in caplog.messages)
    warning = (
        f"the run has made the model worse on the held-out rows: its eval loss is {losses[6]:.4g}, and was "
        f"{losses[0]:.4g} before the first step; `lopt-pp report` says what may help"
    )
    assert caplog.messages.count(warning) == 1
    out.mkdir()
    shutil.copy(whole / "metrics.jsonl", out)
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    train(flags(files, out, f"{given} --resume_from_checkpoint latest"))
    assert eval_losses(out) == losses and same(weights(out), weights(whole))
    assert caplog.messages.count(warning) == 2
    assert [r["step"] for r in records(out) if r["stage"] == 1] == [*range(7)]
    warned = next(advice.text for advice in harm(read_run(out)) if advice.kind == "warn")
    assert f"was {losses[0]:.4g} before the first step and is {losses[6]:.4g} after step 6. What helps" in warned
    assert "(it is 0.0001)" in warned  # A tenth of --learning_rate, by default.


def test_the_pretrained_model_is_no_checkpoint(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It was the best; what is kept is the best after it, with a warning."""
    best = "--load_best_model_at_end true --eval_steps 2 --save_steps 2 --learning_rate 1e-2"
    train(flags(files, tmp_path / "out", f"--eval_file {files / 'odd.jsonl'} --eval_on_start {best}"))
    losses = eval_losses(tmp_path / "out")
    assert losses[0] < losses[2] < losses[4] < losses[6]
    assert plain_loss(tmp_path / "out", files / "odd.jsonl") == pytest.approx(losses[2], rel=1e-5)
    assert f"its eval loss is {losses[2]:.4g}, and was {losses[0]:.4g} before the first step" in caplog.text


def test_a_run_that_got_better_says_nothing(files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = f"--eval_file {files / 'held_out.jsonl'} --eval_on_start --learning_rate 1e-2"
    train(flags(files, tmp_path / "out", more))
    losses = eval_losses(tmp_path / "out")
    assert losses[6] < losses[0] and "worse" not in caplog.text


def test_a_run_that_is_stopped_after_its_start(files: Path, tmp_path: Path) -> None:
    """Three stages in three processes end after the same step, and go on without another evaluation at the start."""
    more = f"--num_stages 3 --queue_depth 5 --eval_on_start --eval_file {files / 'held_out.jsonl'} --max_steps 200"
    arguments = flags(files, tmp_path / "out", more)
    with ranks(tmp_path / "first", *[arguments] * 3) as started:
        until(lambda: "step 0/200: eval loss" in started[0].text)
        started[0].kill(signal.SIGTERM)
        assert [rank.status(60) for rank in started] == [STOPPED_STATUS] * 3, "".join(rank.text for rank in started)
    before = records(tmp_path / "out")
    step = before[-1]["step"]
    assert step < 200 and len(before) == 3 * (step + 1)
    train([*arguments, "--resume_from_checkpoint", "latest", "--max_steps", str(step + 2)])
    assert [*eval_losses(tmp_path / "out")] == [0, step + 2]
    assert eval_losses(tmp_path / "out")[0] == before[2]["eval_loss"]


def test_a_stop_never_comes_before_the_start() -> None:
    """All stages must make it or none; nobody has to tell another that it is made."""
    store = dist.HashStore()
    stop_signal = StopCoordinator(store, 0, [0], 0)
    ask_to_stop(store, "SIGTERM")
    store.wait(["request/0/0"])
    assert stop_signal.runs(START) and not stop_signal.runs(0)
    stop_signal.close(store)


def test_the_collector_begins_with_the_start(tmp_path: Path) -> None:
    """Of a run that is stopped before its first step, there are the records of step 0."""
    store = dist.HashStore()
    names = ["reconstruction_loss", "loss"]
    collector = Collector(clone(store), tmp_path / "metrics.jsonl", names, 9, lambda step: True, from_start=True)
    for stage in (0, 1):
        post(store, 0, record(stage, 0, {"eval": 0.5}, num_targets=0) | {"num_tokens": 0, "eval_loss": 2.0})
    post_end(store, 0)
    collector.join()
    assert [(r["step"], r["stage"]) for r in records(tmp_path)] == [(0, 0), (0, 1)]
    assert collector.eval_loss(0) == 2.0 and collector.summary()[1]["evaluating"] == 0.5


@pytest.mark.parametrize("rows", ["--eval_file a", "--eval_split_size 3", "--dataset_test_split test"])
def test_it_needs_rows(rows: str) -> None:
    required = f"--model_name_or_path a-model --train_file rows.jsonl --output_dir out {COMMON} --eval_on_start"
    assert parse_config([*required.split(), *rows.split()]).evaluation.eval_on_start
    sources = "--eval_file, --eval_split_size or --dataset_test_split"
    with pytest.raises(LoptError, match=f"^--eval_on_start needs rows to evaluate on: give {sources}$"):
        parse_config(required.split())

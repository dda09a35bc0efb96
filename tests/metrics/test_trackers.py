"""Metrics in TensorBoard and Weights & Biases, and the flags for them."""

import logging
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from stores import clone
from synthetic_runs import record

from lopt_pp.config.monitoring import ReportConfig
from lopt_pp.errors import LoptError
from lopt_pp.metrics.collector import Collector, post
from lopt_pp.metrics.records import Record
from lopt_pp.metrics.trackers import check_installed, open_tracker, scalars

FLAGS = {"learning_rate": 1e-4, "method": "lopt"}


def of_step(step: int) -> list[dict[str, Any]]:
    return [
        record(0, step, {"forward": 0.5, "wait_send": 0.25}, reconstruction_loss=1.0 / step, grad_norm=0.5),
        record(1, step, {"forward": 0.5, "wait_receive": 0.125}, loss=2.0 / step, grad_norm=1.5),
    ]


def test_scalars_are_named_by_metric_and_stage() -> None:
    values = scalars(of_step(4))
    assert values["reconstruction_loss/stage 0"] == 0.25 and values["loss/stage 1"] == 0.5
    assert values["share computing/stage 0"] == 0.5 and values["share waiting to send/stage 0"] == 0.25
    assert values["share waiting to receive/stage 1"] == 0.125
    assert values["peak_memory_bytes/stage 1"] == 2**30 and values["step_seconds/stage 0"] == 1.0
    assert not any(name.startswith(("forward_seconds", "stage/", "step/")) for name in values)


def test_of_an_evaluation_before_the_first_step_there_is_what_it_measured() -> None:
    records = [
        record(0, 0, {"eval": 0.5}, eval_reconstruction_loss=0.5, epoch=0.0),
        record(1, 0, {"eval": 0.5}, eval_loss=2.0, eval_perplexity=7.4),
    ]
    assert scalars(records) == {
        "eval_reconstruction_loss/stage 0": 0.5,
        "eval_loss/stage 1": 2.0,
        "eval_perplexity/stage 1": 7.4,
    }


def test_tensorboard_has_all_stages_in_one_run(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = open_tracker(ReportConfig(report_to="tensorboard"), tmp_path, FLAGS, steps_done=0)
    assert tracker is not None
    for step in range(1, 6):
        tracker.step(step, of_step(step), [])
    tracker.end()
    # The run goes on from step 3.
    tracker = open_tracker(ReportConfig(report_to="tensorboard"), tmp_path, FLAGS, steps_done=3)
    assert tracker is not None
    tracker.step(4, of_step(8), [])
    tracker.end()
    events = accumulators.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss/stage 1")]
    assert losses == [(1, 2.0), (2, 1.0), (3, pytest.approx(2 / 3)), (4, 0.25)]
    assert [event.step for event in events.Scalars("grad_norm/stage 0")] == [1, 2, 3, 4]
    assert b"`--learning_rate` | 0.0001" in events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0]


def test_places_and_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    config = ReportConfig(report_to="tensorboard", logging_dir=str(tmp_path / "logs"), run_name="first")
    tracker = open_tracker(config, tmp_path / "out", FLAGS, steps_done=0)
    assert tracker is not None
    tracker.end()
    assert list((tmp_path / "logs" / "first").glob("events.out.tfevents.*"))
    assert open_tracker(ReportConfig(), tmp_path, FLAGS, 0) is None


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the module's interface, without the module."""
    run, given = FakeRun(), {}
    module = types.ModuleType("wandb")
    module.init = lambda **arguments: given.update(arguments) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = open_tracker(ReportConfig(report_to="wandb"), tmp_path / "out", FLAGS, 0)
    assert tracker is not None
    tracker.step(7, of_step(7), [])
    tracker.end()
    assert given == {"name": "out", "dir": str(tmp_path / "out" / "runs"), "config": FLAGS}
    assert run.logged == [(7, scalars(of_step(7)))] and run.finished


def test_weights_and_biases_that_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("no API key configured\nand more")

    module = types.ModuleType("wandb")
    module.init = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(LoptError, match="^--report_to wandb: no API key configured$"):
        open_tracker(ReportConfig(report_to="wandb"), tmp_path, FLAGS, 0)


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(LoptError, match=f"--report_to {name} needs the package {name}.*pip install {name}"):
            check_installed(ReportConfig(report_to=name))
    check_installed(ReportConfig())


class Failing:
    name = "the failing one"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, step: int, records: object, replicas: object) -> None:
        self.steps.append(step)
        raise ValueError("disk full")

    def end(self) -> None:
        raise AssertionError("it has failed before")


class Good:
    name = "the good one"

    def __init__(self) -> None:
        self.told: list[object] = []

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        self.told.append((step, [own["stage"] for own in records], [len(own) for own in replicas]))

    def end(self) -> None:
        self.told.append("end")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store, failing, good = dist.HashStore(), Failing(), Good()
    collector = Collector(
        clone(store),
        tmp_path / "metrics.jsonl",
        ["reconstruction_loss", "loss"],
        num_steps=3,
        logging_steps=10,
        listeners=[failing, good],
    )
    for step in range(1, 4):
        for own in of_step(step):
            post(store, 0, own)
    collector.join()
    assert failing.steps == [1]
    assert good.told == [*[(step, [0, 1], [1, 1]) for step in (1, 2, 3)], "end"]
    assert [m for m in caplog.messages if "failing" in m] == [
        "the failing one has failed: disk full. Training goes on without it"
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(("trace", "steps"), [("11-14", range(11, 15)), ("3-3", range(3, 4)), (None, range(0))])
def test_trace_windows(trace: str | None, steps: range) -> None:
    assert ReportConfig(trace=trace).trace_window == steps


@pytest.mark.parametrize("trace", ["0-3", "5-4", "7", "a-b", "-3", "1-2-3"])
def test_unusable_trace_windows(trace: str) -> None:
    with pytest.raises(LoptError, match=f"--trace {trace}: the first and the last step"):
        ReportConfig(trace=trace)


def test_unusable_probe_steps() -> None:
    with pytest.raises(LoptError, match="--probe_steps -1: at least 0"):
        ReportConfig(probe_steps=-1)

"""Metrics in trackers, through the callbacks of transformers, and the flags for them.

TensorBoard is tried in CI; the others are where their packages are installed, without a network.
"""

import importlib.util
import json
import logging
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import tracked
from stores import clone
from tracked import RUN_ID, of_step, track

from lopt_pp.config.monitoring import ReportConfig
from lopt_pp.config.parser import load_config
from lopt_pp.errors import LoptError
from lopt_pp.metrics.collector import Collector, post
from lopt_pp.metrics.installed import check_installed, tracks
from lopt_pp.metrics.records import Record
from lopt_pp.metrics.trackers import chosen

Points = list[tuple[int, float]]
"""(step, value) of the last stage's loss: 2 over the step."""

UNTIL_4: Points = [(step, 2 / step) for step in (1, 2, 3, 4)]
FROM_4: Points = [(step, 2 / step) for step in (4, 5, 6)]


def rounded(points: Points) -> Points:
    """float32 is what TensorBoard keeps."""
    return [(step, round(value, 6)) for step, value in points]


def test_tensorboard_has_all_stages_in_one_run_and_goes_on_in_it(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    track("tensorboard", str(tmp_path), 0)
    track("tensorboard", str(tmp_path), 3)
    events = accumulators.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert rounded(losses) == rounded([*UNTIL_4[:3], *FROM_4])
    assert [event.step for event in events.Scalars("train/grad_norm/stage 0")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Scalars("train/train_runtime")] == [6]
    shown = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert shown["learning_rate"] == 2e-5 and shown["num_stages"] == load_config(**_needed()).pipeline.num_stages
    assert b"llama" in events.Tensors("model_config/text_summary")[0].tensor_proto.string_val[0]


def test_places_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    track("tensorboard", str(tmp_path / "out"), 0, logging_dir=str(tmp_path / "logs"), run_name="first")
    assert list((tmp_path / "logs" / "first").glob("events.out.tfevents.*"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    track("tensorboard", str(tmp_path / "out"), 0)
    assert list((tmp_path / "elsewhere").glob("events.out.tfevents.*")) and not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(LoptError, match="^--logging_dir .*/file cannot be written: "):
        track("tensorboard", str(tmp_path), 0, logging_dir=str(tmp_path / "file"))


def _needed() -> dict[str, Any]:
    return {"model_name_or_path": "m", "train_file": "rows.jsonl", "output_dir": "out"}


def _wandb(directory: Path) -> list[Points]:
    from wandb.proto import wandb_internal_pb2

    runs = []
    for path in sorted(directory.glob(f"out/runs/wandb/offline-run-*-{RUN_ID}/run-{RUN_ID}.wandb")):
        points: Points = []
        for data in _records_of_leveldb(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            values = {"/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            values |= {item.key: json.loads(item.value_json) for item in record.history.item if item.key}
            if "train/loss" in values:
                points.append((values["train/global_step"], values["train/loss"]))
        runs.append(points)
    return runs


def _records_of_leveldb(data: bytes) -> Iterator[bytes]:
    """Of a file in LevelDB's format of logs, behind a header of seven bytes."""
    position, record = 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # A whole one, or the end of one.
            yield record
            record = b""


def _trackio(directory: Path) -> list[Points]:
    runs: dict[str, Points] = {}
    with sqlite3.connect(directory / "trackio" / "lopt-test.db") as database:
        for run, values in database.execute("select run_id, metrics from metrics order by id"):
            if "train/loss" in (logged := json.loads(values)):
                runs.setdefault(run, []).append((logged["train/global_step"], logged["train/loss"]))
    return list(runs.values())


def _mlflow(directory: Path) -> list[Points]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{directory}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'lopt-test'")
    runs = client.search_runs([experiment.experiment_id])
    assert all(run.info.status == "FINISHED" and run.data.params["max_steps"] == "6" for run in runs)
    return [[(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] for run in runs]


def _comet(directory: Path) -> list[Points]:
    runs = []
    for path in sorted((directory / "out" / "runs").glob(f"{RUN_ID}*.zip"), key=lambda path: path.stat().st_mtime_ns):
        lines = zipfile.ZipFile(path).read("messages.json").decode().splitlines()
        metrics = [message["payload"].get("metric") or {} for message in map(json.loads, lines)]
        runs.append([(m["step"], m["metricValue"]) for m in metrics if m.get("metricName") == "train/loss"])
    return runs


def _swanlab(directory: Path) -> list[Points]:
    runs = []
    for path in sorted((directory / "out" / "runs").glob(f"run-*-{RUN_ID}")):
        # Its first column is the loss, the first of what is logged.
        lines = [line for file in sorted((path / "logs" / "1").glob("*.log")) for line in file.read_text().splitlines()]
        runs.append([(point["index"], point["data"]) for point in map(json.loads, lines)])
    return runs


LIBRARIES: Mapping[str, tuple[Callable[[Path], list[Points]], list[Points], dict[str, str]]] = {
    "wandb": (_wandb, [UNTIL_4, FROM_4], {"WANDB_MODE": "offline"}),
    "trackio": (_trackio, [[*UNTIL_4, *FROM_4]], {}),
    "mlflow": (_mlflow, [[*UNTIL_4, *FROM_4]], {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}),
    "comet_ml": (_comet, [UNTIL_4, FROM_4], {"COMET_API_KEY": "none", "COMET_START_ONLINE": "0"}),
    "swanlab": (_swanlab, [UNTIL_4, FROM_4], {"SWANLAB_MODE": "local"}),
}
"""How to read what a tracker has, what that is, and its variables. Offline, what goes on is a run of the same id."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_each_library_takes_the_run_and_goes_on_with_it(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(name) is None:  # Not imported here, since some of them change what is there.
        pytest.skip(f"{name} is not installed")
    read, expected, variables = LIBRARIES[name]
    environment = (
        os.environ | variables | {"TRACKIO_DIR": str(tmp_path / "trackio"), "COMET_ERROR_TRACKING_ENABLE": "0"}
    )
    for steps_done in ("0", "3"):
        command = [sys.executable, tracked.__file__, name, str(tmp_path / "out"), steps_done]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert [rounded(points) for points in read(tmp_path)] == [rounded(points) for points in expected]


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet_ml", "comet-ml")):
        with pytest.raises(
            LoptError, match=f"^--report_to {name} needs the package {package},.*pip install {package}$"
        ):
            check_installed(ReportConfig(report_to=["kubeflow", name]))
    for names in (None, ["none"], ["all"], ["kubeflow"]):
        check_installed(ReportConfig(report_to=names))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("none", ()),
        ("wandb", ("wandb",)),
        (["tensorboard", "trackio", "tensorboard"], ("tensorboard", "trackio")),
        (None, ()),
    ],
)
def test_trackers_are_chosen_as_in_transformers(given: Any, names: Sequence[str]) -> None:
    config = load_config(**_needed(), **({} if given is None else {"report_to": given})).report
    assert chosen(config) == tuple(names) and tracks(config) == bool(names)


def test_all_trackers_are_those_that_are_installed() -> None:
    pytest.importorskip("tensorboard")
    assert "tensorboard" in chosen(ReportConfig(report_to=["all"]))


def test_a_job_of_kubeflow_is_told_how_far_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://127.0.0.1:9")
    assert tracks(ReportConfig()) and chosen(ReportConfig()) == ("kubeflow",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["tensorbord"], "--report_to 'tensorbord': expected one or several of none, all, tensorboard, wandb"),
        (["all", "wandb"], "--report_to: all and none stand alone"),
    ],
)
def test_unusable_trackers(given: list[str], message: str) -> None:
    with pytest.raises(LoptError, match=f"^{message}"):
        ReportConfig(report_to=given)


class Failing:
    name = "the failing one"

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, step: int, records: object, replicas: object) -> None:
        self.steps.append(step)
        raise ValueError("disk full")

    def saved(self, step: int) -> None:
        raise AssertionError("it has failed before")

    def end(self) -> None:
        raise AssertionError("it has failed before")


class Good:
    name = "the good one"

    def __init__(self) -> None:
        self.told: list[object] = []

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        self.told.append((step, [own["stage"] for own in records], [len(own) for own in replicas]))

    def saved(self, step: int) -> None:
        self.told.append(f"saved {step}")

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
        logs_after=lambda step: False,
        listeners=[failing, good],
    )
    for step in range(1, 4):
        for own in of_step(step):
            post(store, 0, own)
    collector.join()
    collector.saved(2)
    assert failing.steps == [1]
    assert good.told == [*[(step, [0, 1], [1, 1]) for step in (1, 2, 3)], "end", "saved 2"]
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

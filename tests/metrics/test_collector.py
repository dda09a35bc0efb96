"""The records of all stages, brought together by rank 0."""

import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from stores import clone

from lopt_pp.metrics.begin import Reporter
from lopt_pp.metrics.collector import Collector, join_replicas, post, post_end
from lopt_pp.metrics.logs import logs_after
from lopt_pp.metrics.mfu import Work
from lopt_pp.metrics.records import PHASES
from lopt_pp.util.threads import result_in_time

LOSS_NAMES = ["reconstruction_loss", "loss"]


def seldom(step: int) -> bool:
    """Of log lines."""
    return False


@pytest.fixture(params=["hash", "tcp"])
def store(request: pytest.FixtureRequest) -> dist.Store:
    """The store of a run: one process's own, or one between processes."""
    if request.param == "hash":
        return dist.HashStore()
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))


def record_of(stage: int, step: int) -> dict[str, Any]:
    """Stage 0 computes for 6 of 10 seconds and waits for 1 to send; stage 1 for 3, and for 5 to receive."""
    seconds = {
        "forward": 1.0,
        "backward": 2.0,
        "optimizer": 3.0,
        "wait_receive": 0.0,
        "wait_send": 1.0,
        "schedule": 0.0,
        "probe": 0.0,
        "eval": 0.0,
    }
    if stage == 1:
        seconds = {
            "forward": 1.0,
            "backward": 1.0,
            "optimizer": 1.0,
            "wait_receive": 5.0,
            "wait_send": 0.0,
            "schedule": 0.0,
            "probe": 0.0,
            "eval": 0.0,
        }
    return {
        "step": step,
        "stage": stage,
        LOSS_NAMES[stage]: step + stage / 8,
        "num_tokens": 100 * step,
        "step_seconds": 10.0,
        "tokens_per_second": 10.0 * step,
        **{f"{phase}_seconds": seconds[phase] for phase in PHASES},
    }


def collect(store: dist.Store, path: Path, num_steps: int, logging_steps: int = 1) -> Collector:
    """Collects a run in which stage 0 is done with all steps before stage 1 reports its first."""
    collector = Collector(
        clone(store), path, LOSS_NAMES, num_steps, lambda step: logs_after(step, logging_steps, False, num_steps)
    )
    for stage in range(2):
        for step in range(1, num_steps + 1):
            post(store, 0, record_of(stage, step))
    collector.join()
    return collector


def test_metrics_come_by_step_and_stage(store: dist.Store, tmp_path: Path) -> None:
    collect(store, tmp_path / "metrics.jsonl", 3)
    expected = [record_of(stage, step) for step in (1, 2, 3) for stage in (0, 1)]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected


def test_a_run_that_ends_early_has_the_records_until_then(store: dist.Store, tmp_path: Path) -> None:
    collector = Collector(clone(store), tmp_path / "metrics.jsonl", LOSS_NAMES, 100, seldom)
    for step in (1, 2):
        for stage in (0, 1):
            post(store, 0, record_of(stage, step))
    post_end(store, 2)
    collector.join()
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


def test_a_step_is_written_as_soon_as_all_stages_have_reported_it(tmp_path: Path) -> None:
    """The next step's records come late; what is there must not wait for them, nor for the end."""
    store = dist.HashStore()
    path = tmp_path / "metrics.jsonl"
    asked = FirstAsked(store, "record/0/2/0")
    collector = Collector(asked, path, LOSS_NAMES, 2, seldom)
    post(store, 0, record_of(0, 1))
    post(store, 0, record_of(1, 1))
    store.wait([asked.mark], timedelta(seconds=30))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record_of(0, 1), record_of(1, 1)]
    post(store, 0, record_of(0, 2))
    post(store, 0, record_of(1, 2))
    collector.join()
    assert len(path.read_text().splitlines()) == 4


def test_a_step_is_logged_before_its_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which may take long; the record of the step comes afterwards, as a whole."""
    caplog.set_level(logging.INFO)
    store, path = dist.HashStore(), tmp_path / "metrics.jsonl"
    asked = FirstAsked(store, "record/0/1/0/evaluated")
    collector = Collector(asked, path, LOSS_NAMES, 1, lambda step: True)
    report = Reporter(store, 0, dict.fromkeys((0, 1), Work(0, 0, 0, 0, None)), 0.0)
    evaluated = [record_of(0, 1), record_of(1, 1) | {"eval_loss": 2.0, "eval_perplexity": math.exp(2)}]
    for stage in (0, 1):
        report.trained(record_of(stage, 1))
    store.wait([asked.mark], timedelta(seconds=30))
    assert caplog.messages == ["step 1/1: stage 0 reconstruction_loss 1, stage 1 loss 1.125, 10 tokens/s"]
    assert path.read_text() == ""
    for record in evaluated:
        report(record)
    collector.join()
    assert caplog.messages[1:] == ["step 1/1: eval loss 2, perplexity 7.389"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == evaluated


class FirstAsked(dist.Store):
    """Leaves a mark in a store when a key is asked for."""

    mark = "asked"

    def __init__(self, store: dist.Store, key: str) -> None:
        super().__init__()
        self._store, self._key = store, key

    def get(self, key: str) -> bytes:
        if key == self._key:
            self._store.set(self.mark, "")
        return self._store.get(key)

    def delete_key(self, key: str) -> bool:
        return self._store.delete_key(key)


def test_the_store_keeps_nothing(store: dist.Store, tmp_path: Path) -> None:
    before = store.num_keys()
    collect(store, tmp_path / "metrics.jsonl", 3)
    assert store.num_keys() == before


def test_log_lines_come_each_logging_steps_and_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With losses that are the mean since the last one; the speed is of the last stage's steps, of 10 seconds each."""
    caplog.set_level(logging.INFO, logger="lopt_pp.metrics.collector")
    collect(dist.HashStore(), tmp_path / "metrics.jsonl", 5, logging_steps=2)
    assert caplog.messages == [
        "step 2/5: stage 0 reconstruction_loss 1.5, stage 1 loss 1.625, 20 tokens/s, 00:30 left",
        "step 4/5: stage 0 reconstruction_loss 3.5, stage 1 loss 3.625, 30 tokens/s, 00:10 left",
        "step 5/5: stage 0 reconstruction_loss 5, stage 1 loss 5.125, 35 tokens/s",
    ]
    caplog.clear()
    collect(dist.HashStore(), tmp_path / "none.jsonl", 5, logging_steps=0)
    assert not caplog.messages


def test_summary_gives_shares_of_the_wall_time(tmp_path: Path) -> None:
    first, second = collect(dist.HashStore(), tmp_path / "metrics.jsonl", 3).summary()
    assert first == pytest.approx({"computing": 0.6, "waiting to receive": 0.0, "waiting to send": 0.1})
    assert second == pytest.approx({"computing": 0.3, "waiting to receive": 0.5, "waiting to send": 0.0})


def test_records_of_replicas_are_joined() -> None:
    """Losses and tokens add up, seconds are the mean, memory is the most."""
    first, second = (
        {"stage": 1, "step": 3, "loss": loss, "num_tokens": tokens, "step_seconds": seconds, "peak_memory_bytes": peak}
        for loss, tokens, seconds, peak in [(0.5, 30, 2.0, 7), (0.25, 10, 6.0, 5)]
    )
    assert join_replicas([first, second]) == {
        "stage": 1,
        "step": 3,
        "loss": 0.75,
        "num_tokens": 40,
        "step_seconds": 4.0,
        "peak_memory_bytes": 7,
        "tokens_per_second": 10.0,
    }


def test_an_evaluation_is_logged_joined_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two replicas have measured their shares of the mean after step 2; infinity counts as no loss."""
    caplog.set_level(logging.INFO, logger="lopt_pp.metrics.collector")
    store = dist.HashStore()
    collector = Collector(clone(store), tmp_path / "metrics.jsonl", LOSS_NAMES, 3, seldom, num_replicas=2)
    for step in (1, 2, 3):
        for replica, eval_loss in enumerate((0.5, 0.25)):
            post(store, replica, record_of(0, step))
            measured = {2: {"eval_loss": eval_loss}, 3: {"eval_loss": float("inf")}}.get(step, {})
            post(store, replica, record_of(1, step) | measured)
    assert [collector.eval_loss(step) for step in (1, 2, 3)] == [None, 0.75, None]
    collector.join()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[3]["eval_loss"] == 0.75 and records[3]["eval_perplexity"] == pytest.approx(math.exp(0.75))
    assert "eval_perplexity" not in records[1] and "eval_perplexity" not in records[2]
    assert "step 2/3: eval loss 0.75, perplexity 2.117" in caplog.messages


def test_the_loss_of_a_step_is_waited_for(tmp_path: Path) -> None:
    store = dist.HashStore()
    collector = Collector(clone(store), tmp_path / "metrics.jsonl", LOSS_NAMES, 1, seldom)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(collector.eval_loss, 1)
        post(store, 0, record_of(0, 1))
        assert not asked.done()
        post(store, 0, record_of(1, 1) | {"eval_loss": 2.5})
        assert asked.result(30) == 2.5
    collector.join()


def test_nobody_waits_for_a_collector_that_has_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such as what makes a checkpoint, which has no metrics then."""
    store = dist.HashStore()
    collector = Collector(clone(store), tmp_path / "metrics.jsonl", LOSS_NAMES, 2, seldom)
    store.set("record/0/1/0", "not a record")
    assert result_in_time(lambda: collector.measured(2), 30) == {}
    collector.join()
    (said,) = caplog.messages
    assert said == "no more metrics are collected, because of an error. Training goes on without them"


def test_summary_tells_the_share_of_evaluations(tmp_path: Path) -> None:
    store = dist.HashStore()
    collector = Collector(clone(store), tmp_path / "metrics.jsonl", LOSS_NAMES, 1, seldom)
    for stage in (0, 1):
        post(store, 0, record_of(stage, 1) | {"eval_seconds": 2.5 * stage})
    collector.join()
    first, second = collector.summary()
    assert "evaluating" not in first and second["evaluating"] == 0.25

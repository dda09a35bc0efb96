"""Checkpoints that come due while a disk is still busy with the one before."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from in_process import train
from ranks import ranks
from tiny import InputsWith
from torch.distributed import HashStore

from lopt_pp.checkpoint import writer
from lopt_pp.checkpoint.committer import Committer
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.checkpoint.writer import copied_key
from lopt_pp.distributed.shutdown import RunLength, StopCoordinator, ask_to_stop
from lopt_pp.metrics.collector import Collector
from lopt_pp.model.partition import split_evenly
from lopt_pp.training import checkpointing
from lopt_pp.training.checkpointing import Checkpointer

LONG = 30
"""Seconds, for what waits where the code is wrong."""


class SlowDisk:
    """A disk on which no part of a checkpoint is whole before `released` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        checksum = writer.file_sha256

        def slow(path: Path) -> str:
            self.released.wait(LONG)
            return checksum(path)

        monkeypatch.setattr(writer, "file_sha256", slow)


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in complete_checkpoints(out))


def test_a_disk_slower_than_checkpoints_come_due_costs_checkpoints_and_holds_up_nobody(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The parts of step 2 are whole after step 5 only, which is not reached by who waits for them at step 4."""
    disk, after_step = SlowDisk(monkeypatch), Checkpointer.after_step

    def release(self: Checkpointer, steps_done: int) -> None:
        after_step(self, steps_done)
        if steps_done == 5:
            assert not disk.released.is_set()
            disk.released.set()

    monkeypatch.setattr(Checkpointer, "after_step", release)
    monkeypatch.setattr(checkpointing, "_PATIENCE", 0.0)
    with caplog.at_level(logging.WARNING):
        assert train(inputs, tmp_path / "out", "--max_steps 6 --save_steps 2")
    assert saved(tmp_path / "out") == ["checkpoint-2", "checkpoint-6"]
    assert "no checkpoint at step 4: stage 0 is still writing its part of that of step 2" in caplog.text


def test_a_stage_that_has_not_come_so_far_costs_no_checkpoint() -> None:
    """Its disk may be as fast as any; once it has come, the disk is waited for, and then given up."""
    store, specs = HashStore(), split_evenly(2, 2)
    nothing: Any = None
    committer = Committer(Path(), nothing, specs, "", nothing, {}, nothing, None, RunLength(9))
    committer._pending, committer._missing = [2], 1
    assert committer.await_parts(0.0, store) == ""
    store.set(copied_key(2, 1), "")
    assert committer.await_parts(0.0, store) == "stage 1 is still writing its part of that of step 2"


def test_who_waits_for_a_disk_hears_that_the_next_stage_has_not_come_so_far(tmp_path: Path) -> None:
    shared, asked, nothing = HashStore(), threading.Event(), cast(Any, None)

    class Noting:
        def check(self, keys: list[str]) -> bool:
            asked.set()
            return bool(shared.check(keys))

    committer = Committer(tmp_path, shared, split_evenly(2, 2), "", nothing, {}, nothing, None, RunLength(9))
    shared.set(copied_key(2, 0), "")
    committer.expect(2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(committer.await_parts, 1e6, cast(Any, Noting()))
        assert asked.wait(LONG) and not waiting.done()
        shared.set("part/2/0", "{}")
        try:
            assert waiting.result(LONG) == ""
        finally:
            shared.set("part/2/1", '{"error": "a full disk"}')
    committer.join()


def test_a_fast_disk_is_waited_for(inputs: Path, tmp_path: Path) -> None:
    """However short the steps are."""
    assert train(inputs, tmp_path / "out", "--max_steps 6 --save_steps 1")
    assert saved(tmp_path / "out") == [f"checkpoint-{step}" for step in range(1, 7)]


def test_a_run_that_is_stopped_where_a_checkpoint_was_skipped_saves_it(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, store, decided = SlowDisk(monkeypatch), HashStore(), threading.Event()
    after_step, await_request, decide = Checkpointer.after_step, StopCoordinator._await_requests, Checkpointer._decide

    def stop(self: Checkpointer, steps_done: int) -> None:
        after_step(self, steps_done)
        if steps_done == 4:
            ask_to_stop(store, "SIGTERM")
            assert decided.wait(LONG)

    def tell(self: StopCoordinator) -> None:
        await_request(self)
        decided.set()

    def release(self: Checkpointer, step: int, must: bool = False) -> bool:
        if must:
            disk.released.set()
        return decide(self, step, must)

    monkeypatch.setattr(Checkpointer, "after_step", stop)
    monkeypatch.setattr(Checkpointer, "_decide", release)
    monkeypatch.setattr(StopCoordinator, "_await_requests", tell)
    monkeypatch.setattr(checkpointing, "_PATIENCE", 0.0)
    assert not train(inputs, tmp_path / "out", "--max_steps 50 --save_steps 2", store=store)
    assert saved(tmp_path / "out") == ["checkpoint-2", "checkpoint-4"]


def test_only_the_best_is_saved_and_a_run_that_is_stopped(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The latter although it is not the best; a run that goes on from there knows what the best was before."""
    store, decided, losses = HashStore(), threading.Event(), [3.0, 2.0, 5.0, 5.0, 1.0, 1.0]
    after_step, await_request = Checkpointer.after_step, StopCoordinator._await_requests

    def stop(self: Checkpointer, steps_done: int) -> None:
        after_step(self, steps_done)
        if steps_done == 3 and not decided.is_set():
            ask_to_stop(store, "SIGTERM")
            assert decided.wait(LONG)

    def tell(self: StopCoordinator) -> None:
        await_request(self)
        decided.set()

    monkeypatch.setattr(Checkpointer, "after_step", stop)
    monkeypatch.setattr(StopCoordinator, "_await_requests", tell)
    monkeypatch.setattr(Collector, "measured", lambda self, step: {"eval_loss": losses[step - 1]})
    more = "--max_steps 6 --save_strategy best --eval_steps 1 --eval_split_size 2"
    assert not train(inputs, tmp_path / "out", more, store=store)
    assert saved(tmp_path / "out") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert train(inputs, tmp_path / "out", f"{more} --resume_from_checkpoint latest")
    assert saved(tmp_path / "out") == [f"checkpoint-{step}" for step in (1, 2, 3, 5, 6)]
    assert not list((tmp_path / "out").glob("*.unfinished"))


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_replicas_are_not_held_up_by_the_disk_of_one(inputs_with: InputsWith, tmp_path: Path, sharding: str) -> None:
    """Nor do those who share out a stage wait in the gathering for who skips the checkpoint."""
    inputs = inputs_with()
    given = (
        f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {tmp_path / 'out'}"
    )
    given += f" --num_stages 1 --data_parallel 2 --sharding {sharding} --max_steps 6 --save_steps 2"
    arguments = [tmp_path / "released", *given.split()]
    with ranks(tmp_path, arguments, arguments, module="slow_disk") as started:
        assert [rank.status(120) for rank in started] == [0, 0], [rank.text for rank in started]
    assert saved(tmp_path / "out") == ["checkpoint-2", "checkpoint-6"]
    assert "no checkpoint at step 4: stage 0 is still writing its part of that of step 2" in started[0].text

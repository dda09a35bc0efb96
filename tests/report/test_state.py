"""What a page says of a run's state, from the files that the run and its lock leave."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from synthetic_runs import about, record, write_run

from lopt_pp.checkpoint.lock import LEASE_SECONDS, Holder
from lopt_pp.metrics.state import StateFile
from lopt_pp.report.run_data import RunData, read_run
from lopt_pp.report.state import StateReader, duration
from lopt_pp.util.process import Process, own_process


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    records = [record(stage, step, {"forward": 0.9}, wall=3.0) for step in range(1, 11) for stage in (0, 1)]
    yield write_run(tmp_path / "out", records, about([(0, 15), (15, 30)], [[0], [1]]))


def lock(out: Path, process: Process) -> None:
    (out / ".lock-1").write_text(json.dumps(asdict(Holder(process, "launch", 0, "", 0))))


def state(out: Path, run: RunData | None = None) -> tuple[str, str]:
    read = StateReader(out).read(run)
    assert read is not None
    return read.name, read.text


def test_before_a_run(tmp_path: Path) -> None:
    assert state(tmp_path / "gone") == (
        "waiting",
        f"{tmp_path}/gone is not there yet; this page begins when a run does",
    )
    assert state(tmp_path) == ("waiting", f"no run has begun in {tmp_path}; this page begins when one does")
    lock(tmp_path, own_process())
    assert state(tmp_path) == ("starting", "loading the model and the rows")


def test_a_run_that_goes_on(out: Path) -> None:
    lock(out, own_process())
    file = StateFile(out, 0)
    assert state(out) == ("training", "the first step")
    assert state(out, read_run(out)) == ("training", "step 10 of 100, about 4 min left")
    (out / "checkpoint-10.unfinished").mkdir()
    (out / "checkpoint-5.removed.unfinished").mkdir()
    assert state(out, read_run(out))[1].endswith("left, saving checkpoint-10")
    # It is started again, in another process: what the old one has said does not count.
    file.end("stopped", 10, "SIGTERM")
    assert state(out)[0] == "stopped"
    lock(out, replace(own_process(), started="0"))
    assert state(out)[0] in ("dead", "starting")


def test_an_end_stays_when_the_lock_is_gone(out: Path) -> None:
    file = StateFile(out, 0)
    assert state(out)[0] == "ended", "nobody holds the lock, and the run has said nothing of its end"
    file.end("failed", 7, "stage 0: the loss of step 8 is nan")
    name, text = state(out)
    assert name == "failed" and text.endswith(", after step 7: stage 0: the loss of step 8 is nan")


def test_a_run_of_before_has_left_no_word(out: Path) -> None:
    assert StateReader(out).read(read_run(out)) is None


def test_a_process_that_is_gone_is_seen_at_once(out: Path) -> None:
    StateFile(out, 0)
    content = json.loads((out / "state.json").read_text())
    content["process"]["started"] = "1"  # Of this number another process is there now.
    (out / "state.json").write_text(json.dumps(content))
    lock(out, Process(**content["process"]))
    name, text = state(out, read_run(out))
    assert name == "dead" and "is gone or hangs: no sign of the run since" in text and "made 10 steps" in text


def test_a_silent_run_on_another_machine_is_dead_after_a_minute(out: Path) -> None:
    away = replace(own_process(), host="far", machine="another")
    lock(out, away)
    content = json.loads(
        json.dumps({"state": "evaluating", "since": 0, "step": 10, "reason": "", "process": asdict(away)})
    )
    (out / "state.json").write_text(json.dumps(content))
    now = [0.0]
    reader = StateReader(out, lambda: now[0])

    def name() -> str:
        read = reader.read(None)
        assert read is not None
        return read.name

    assert name() == "evaluating"
    now[0] = LEASE_SECONDS
    assert name() == "evaluating"
    (out / ".lock-1").touch()
    now[0] = 1.5 * LEASE_SECONDS
    assert name() == "evaluating", "the lock was renewed meanwhile"
    now[0] = 3 * LEASE_SECONDS
    assert name() == "dead"
    (out / ".lock-1").touch()
    assert name() == "evaluating", "it hung, and goes on"


def test_times_in_words() -> None:
    words = [duration(seconds) for seconds in (0.4, 99, 100, 3600, 7260, 200_000)]
    assert words == ["0 s", "99 s", "2 min", "60 min", "2 h 01 min", "2.3 days"]

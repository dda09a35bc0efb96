"""The file of a run's metrics, where the disk fails."""

import json
import resource
import signal
from pathlib import Path

import pytest

from lopt_pp.metrics.jsonl import MetricsFile


def test_metrics_that_cannot_be_written_are_said_once_and_go_on_when_they_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    path.parent.mkdir()
    file = MetricsFile(path, 0)
    file.write([{"step": 1}])
    path.unlink()
    path.parent.rmdir()
    file.write([{"step": 2}])
    file.write([{"step": 3}])
    path.parent.mkdir()
    file.write([{"step": 4}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 4}]
    assert caplog.text.count("cannot be written: No such file or directory. Training goes on") == 1


def test_a_line_that_finds_no_room_leaves_no_half(tmp_path: Path) -> None:
    """The limit on a file's size stands in for a full disk: both write a part of the line first."""
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write([{"step": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4, before[1]))
    try:
        file.write([{"step": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    file.write([{"step": 3}])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 3}]


def test_what_is_not_a_record_is_left_out_when_a_run_goes_on(tmp_path: Path) -> None:
    """A machine that goes down may leave anything in the file; the thread that collects must not end of it."""
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "eval_loss": 2.5}\n', b'{"step": 2}\n', b'{"step": 3}\n'
    others = b"5\n", b"\xff\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\0\0\0\n", b"[" * 100_000 + b"\n"
    path.write_bytes(b"".join([whole[0], *others, whole[2], whole[1][:-1]]))
    file = MetricsFile(path, 2)
    assert file.evaluations == {1: {"eval_loss": 2.5}}
    file.write([{"step": 3}])
    assert path.read_bytes() == b"".join(whole)
    path.unlink()
    path.mkdir()
    MetricsFile(path, 2).write([{"step": 3}])

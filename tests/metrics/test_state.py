"""What a run says that it does: of several changes the last one stands, and an end stays."""

import json
import threading
from pathlib import Path

import pytest

from lopt_pp.metrics import state as state_module
from lopt_pp.metrics.state import STATE_FILE, StateFile, read_state


def test_it_is_there_at_once_and_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    both = threading.Event()

    def write_text(path: Path, text: str) -> None:
        written.append(json.loads(text)["state"])
        path.write_text(text)
        if len(written) == 3:
            both.set()

    monkeypatch.setattr(state_module, "write_text", write_text)
    monkeypatch.setattr(state_module, "_PAUSE", 0.01)
    file = StateFile(tmp_path, 7)
    seen = read_state(tmp_path)
    assert seen is not None and (seen.state, seen.step, seen.reason, seen.is_end) == ("training", 7, "", False)
    assert seen.process.is_alive()
    file.set("training", 8)
    file.set("evaluating", 9)
    while written == ["training"]:  # A thread is writing.
        both.wait(0.01)
    file.set("training", 9)
    assert both.wait(60)
    assert written == ["training", "evaluating", "training"]
    file.end("failed", 9, "a reason")
    file.end("stopped", 9, "another")
    file.set("saving", 9)
    seen = read_state(tmp_path)
    assert seen is not None and (seen.state, seen.reason, seen.is_end) == ("failed", "a reason", True)


def test_a_directory_that_was_taken_is_left_alone(tmp_path: Path) -> None:
    StateFile(tmp_path, 0, may_write=lambda: False).end("failed", 0, "taken")
    assert not (tmp_path / STATE_FILE).exists()


def test_a_full_disk_does_not_end_a_run(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "gone", 0)
    (tmp_path / "gone").mkdir()
    file.end("finished", 3)
    seen = read_state(tmp_path / "gone")
    assert seen is not None and seen.state == "finished"


@pytest.mark.parametrize("content", ["", "[]", '{"state": "training"}', '{"process": 3}', "[" * 100_000])
def test_what_no_run_has_written_is_no_state(content: str, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    assert read_state(tmp_path) is None
    assert read_state(tmp_path / "gone") is None

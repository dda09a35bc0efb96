"""benchmarks/speed/schedule.py runs and writes what it promises; how fast, no test on a shared machine can say."""

import json
import sys
from pathlib import Path

import pytest
from forked import run

pytestmark = pytest.mark.slow


def test_quick_run_measures_both_schedules(tmp_path: Path) -> None:
    output = tmp_path / "schedule.json"
    result = run([sys.executable, "-m", "benchmarks.speed.schedule", "--quick", "--output", str(output)])
    assert result.returncode == 0, result.stderr
    written = json.loads(output.read_text())
    assert {"torch", "cpu", "cores", "date"} <= written["machine"].keys()
    runs = {(run["stages"], run["microbatches"]): run for run in written["runs"]}
    assert runs.keys() == {(2, 1), (2, 4), (4, 1), (4, 4)}
    for (stages, microbatches), figures in runs.items():
        assert len(figures["by_stage"]) == stages
        # A stage cannot be done sooner than it has slept, whatever the machine.
        assert 0 < figures["efficiency"] <= 1
        assert 0 < figures["peer_efficiency"] <= 1
        assert figures["fill_seconds"] >= figures["ideal_fill_seconds"]
        assert figures["peer"] == ("1F1B" if microbatches >= stages else "GPipe")
    assert runs[4, 4]["peer_bound"] == (4 * 3 + 0.5) / ((4 + 3) * 3 + 0.5)


def test_help_says_what_is_measured() -> None:
    shown = run([sys.executable, "-m", "benchmarks.speed.schedule", "--help"])
    assert shown.returncode == 0
    assert "efficiency" in shown.stdout and "--quick" in shown.stdout

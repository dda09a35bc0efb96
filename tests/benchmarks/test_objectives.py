"""benchmarks/speed/objectives.py runs and keeps what it promises; how fast, no test on a shared machine can say."""

import json
import sys
from pathlib import Path

import pytest
from forked import run

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only")
def test_quick_run_measures_every_objective_at_both_cuts(tmp_path: Path) -> None:
    output = tmp_path / "objectives.json"
    result = run([sys.executable, "-m", "benchmarks.speed.objectives", "--quick", "--output", str(output)])
    assert result.returncode == 0, result.stderr
    kept = json.loads(output.read_text())
    assert kept["machine"].keys() >= {"torch", "cpu", "cores", "date"}
    cases = [(measured["case"]["objective"], measured["split"]) for measured in kept["results"]]
    assert cases == [(name, cut) for name in ("none", "reconstruction", "next_token") for cut in ("midpoint", "auto")]
    for measured in kept["results"]:
        assert sum(measured["layers"]) == 4 and min(measured["layers"]) > 0
        assert all(stage["seconds"] > 0 for stage in measured["stages"])
    assert result.stdout.count("| midpoint | 2 + 2 |") == 3

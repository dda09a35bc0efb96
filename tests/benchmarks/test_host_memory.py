"""The benchmark of main memory: its result is whole, and loading, saving and resuming hold what they are said to."""

import json
import sys
from pathlib import Path

import pytest
from launching import run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only")
def test_a_process_holds_its_stage_and_little_besides(tmp_path: Path) -> None:
    output = tmp_path / "host.json"
    result = run([sys.executable, "-m", "benchmarks.memory.host", "--quick", "--output", str(output)])
    assert result.returncode == 0, result.stderr
    assert "| replicas | sharding |" in result.stdout
    cases = json.loads(output.read_text())["cases"]
    assert [(case["replicas"], case["sharded"]) for case in cases] == [(1, False), (2, False), (2, True)]
    for case in cases:
        writer, *others = case["processes"]
        assert len(others) == case["replicas"] - 1
        copy, largest = 12 * writer["parameters"], writer["largest"]
        slack = largest / 4
        for own in case["processes"]:
            assert own["load_above"] < 1.2 * largest + slack
            assert own["resume_above"] < 1.2 * largest + slack
            share = case["replicas"] if case["sharded"] else 1
            # DDP holds room for the gradients, in which they are averaged.
            room = 4 * own["parameters"] if case["replicas"] > 1 and not case["sharded"] else 0
            assert 0.9 * copy / share < own["resume_stays"] - room < 1.1 * copy / share
        # Gathered tensors are there twice for a moment, in gloo and as what it gives.
        gathered = 2.5 * largest if case["sharded"] else 0
        assert 0.9 * copy < writer["save_above"] < 1.1 * copy + gathered
        for own in others:
            assert own["save_above"] < gathered + slack

"""The pipeline benchmark's machinery; what it measures here, on a machine that may be busy, says nothing."""

import json
import sys
from pathlib import Path

import pytest
from forked import TORCHRUN, run

pytestmark = pytest.mark.slow


def test_quick_run_keeps_every_method_and_figure(tmp_path: Path) -> None:
    output = tmp_path / "pipeline.json"
    result = run([sys.executable, "-m", "benchmarks.speed.pipeline", "--quick", "--output", str(output)])
    assert result.returncode == 0, result.stderr
    kept = json.loads(output.read_text())

    assert kept["machine"].keys() >= {"torch", "cpu", "cores", "date", "threads_per_process"}
    assert kept["machine"]["threads_per_process"] == 1
    assert [(cell["model"], cell["microbatches"]) for cell in kept["cells"]] == [("tiny", 1), ("tiny", 2)]
    methods = {"lopt", "gpipe", "1f1b", "zero_bubble", "zbv", "naive", "ddp"}
    for cell in kept["cells"]:
        assert cell["seconds"].keys() == cell["tokens_per_second"].keys() == cell["cuts"].keys() == methods
        assert cell["over"].keys() == methods - {"lopt"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in cell["seconds"].values())
        assert len(cell["computing"]) == 2
        assert all(computed["microbatch"] > 0 and computed["optimizer"] > 0 for computed in cell["computing"])
    names = ["efficiency", "over 1F1B", "over zero-bubble", "over ZB-V", "over naive"]
    assert [figure["name"] for figure in kept["figures"]] == 2 * names
    for figure in kept["figures"]:
        assert figure["reached"] == (figure["value"] >= figure["at_least"])
        assert (figure["ideal"] is not None) == (figure["name"] == "over 1F1B")
        assert figure["ideal"] is None or 1 < figure["ideal"] < 2
    assert len(kept["slowdown"]["tiny"]) == 2

    assert "tokens per second" in result.stdout
    assert result.stdout.count("reached") == len(kept["figures"])


def test_methods_can_be_selected(tmp_path: Path) -> None:
    output = tmp_path / "pipeline.json"
    flags = ["--models", "tiny", "--microbatches", "3", "--methods", "1f1b", "--rounds", "1", "--output", str(output)]
    result = run([sys.executable, "-m", *TORCHRUN, "2", "-m", "benchmarks.speed.pipeline", *flags])
    assert result.returncode == 0, result.stderr
    (cell,) = json.loads(output.read_text())["cells"]
    assert cell["microbatches"] == 3
    assert list(cell["seconds"]) == ["lopt", "1f1b"]

"""The memory benchmark: its result is whole, and what it says of this project's stages holds."""

import json
import sys
from typing import Any

import pytest
from forked import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only"),
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("memory") / "memory.json"
    result = run([sys.executable, "-m", "benchmarks.memory.training", "--quick", "--output", str(output)])
    assert result.returncode == 0, result.stderr
    assert "activations" in result.stdout
    return json.loads(output.read_text())


def of(kept: dict[str, Any], layout: str, microbatches: int, queue_depth: int = 2) -> list[dict[str, int]]:
    """What each process holds."""
    (case,) = (
        case
        for case in kept["cases"]
        if (case["layout"], case["microbatches"], case["queue_depth"]) == (layout, microbatches, queue_depth)
        and case["dtype"] == "float32"
    )
    return case["processes_hold"]


def most(kept: dict[str, Any], layout: str, microbatches: int, what: str) -> int:
    return max(held[what] for held in of(kept, layout, microbatches))


def test_result_has_every_layout_and_share(kept: dict[str, Any]) -> None:
    assert kept["machine"].keys() >= {"torch", "cpu", "cores", "date", "device"}
    assert not kept["left_out"]
    for layout in ("LoPT-PP, 2 processes", "1F1B, 2 processes", "GPipe, 2 processes"):
        assert len(of(kept, layout, 1)) == len(of(kept, layout, 8)) == 2
    for layout in ("end to end, 1 process", "LoPT-PP, 2 in 1 process", "LoPT-PP, 4 in 1 process"):
        assert len(of(kept, layout, 1)) == len(of(kept, layout, 8)) == 1
    assert len(of(kept, "LoPT-PP, 4 processes", 8, queue_depth=4)) == 4
    for case in kept["cases"]:
        for held in case["processes_hold"]:
            assert held["gradients"] == held["weights"]
            assert held["imports"] + held["model"] < held["fixed"] < held["peak"]
            assert 0 <= held["queue"] < held["activations"]
            if case["microbatches"] > 1:
                assert held["peak"] == held["fixed"] + held["activations"]
            assert (held["saved"] is None) == case["gradient_checkpointing"]
            assert held["saved"] is None or 0 < held["saved"] < held["activations"]


def test_a_stage_holds_the_activations_of_one_microbatch(kept: dict[str, Any]) -> None:
    names = {"microbatches per step", "messages in the queue", "stages"}
    assert {claim["name"] for claim in kept["claims"]} == names
    for claim in kept["claims"]:
        assert claim["holds"], claim
        assert claim["saved"] <= 1
    for one, eight in zip(of(kept, "LoPT-PP, 2 processes", 1), of(kept, "LoPT-PP, 2 processes", 8), strict=True):
        assert eight["saved"] == one["saved"]
        assert eight["at_work"] < 1.3 * one["at_work"]


def test_others_hold_more(kept: dict[str, Any]) -> None:
    for one, eight in zip(of(kept, "GPipe, 2 processes", 1), of(kept, "GPipe, 2 processes", 8), strict=True):
        assert eight["saved"] == pytest.approx(8 * one["saved"], rel=0.01)
        assert eight["activations"] > 4 * one["activations"]
    # A first stage's 1F1B is one microbatch ahead of the second's.
    ahead, last = (held["saved"] for held in of(kept, "1F1B, 2 processes", 8))
    assert ahead == pytest.approx(2 * of(kept, "1F1B, 2 processes", 1)[0]["saved"], rel=0.01)
    assert last == of(kept, "1F1B, 2 processes", 1)[1]["saved"]
    # In one process, stage after stage: a half of the layers, a quarter of them.
    whole, half, quarter = (
        most(kept, layout, 8, "saved")
        for layout in ("end to end, 1 process", "LoPT-PP, 2 in 1 process", "LoPT-PP, 4 in 1 process")
    )
    assert half < 0.6 * whole
    assert quarter < 0.6 * half

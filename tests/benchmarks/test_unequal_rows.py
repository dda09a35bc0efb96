"""benchmarks/speed/unequal_rows.py and its 1F1B; how fast they are, no test on a shared machine can say."""

import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from launching import run

from benchmarks.helpers.own_shapes import one_forward_one_backward
from benchmarks.speed.unequal_rows_arithmetic import figures, seconds_of_1f1b
from lopt_pp.data import MicrobatchSampler, TokenizedRows

METHODS = {"own shapes", "alike", "reconstruction", "next_token", "frozen"}


@pytest.mark.slow
def test_quick_run_measures_every_way_to_train(tmp_path: Path) -> None:
    output = tmp_path / "unequal_rows.json"
    result = run([sys.executable, "-m", "benchmarks.speed.unequal_rows", "--quick", "--output", str(output)])
    assert result.returncode == 0, result.stderr
    written = json.loads(output.read_text())
    assert {"torch", "cpu", "cores", "date"} <= written["machine"].keys()
    assert written["cuts"].keys() == METHODS
    single, packed = written["cells"]
    assert (single["packing"], packed["packing"]) == (False, True)
    for cell in written["cells"]:
        assert cell["seconds"].keys() == cell["tokens_per_second"].keys() == METHODS
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in cell["seconds"].values())
        assert cell["over_own_shapes"]["own shapes"] == 1
        assert 1 <= cell["computed_own"][0] <= cell["computed_alike"][0]
    # Two microbatches of two rows of their own lengths: something is padded in each, and more where they are alike.
    assert 1 < single["computed_own"][0] < single["computed_alike"][0]
    assert packed["computed_own"] == [1]
    assert "| packed | 2 |" in result.stdout


@pytest.mark.parametrize(("stage", "stages", "microbatches"), [(0, 2, 4), (1, 2, 4), (0, 4, 2), (1, 4, 8), (2, 3, 1)])
def test_1f1b_holds_as_many_microbatches_as_there_are_stages_to_come(
    stage: int, stages: int, microbatches: int
) -> None:
    under_way = most = 0
    forward: list[int] = []
    backward: list[int] = []
    for number, goes_back in one_forward_one_backward(stage, stages, microbatches):
        (backward if goes_back else forward).append(number)
        under_way += -1 if goes_back else 1
        most = max(most, under_way)
    assert forward == backward == list(range(microbatches))
    assert most == min(stages - stage, microbatches)


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 1), (2, 4), (4, 8)])
def test_arithmetic_of_equal_microbatches_is_that_of_1f1bs_bubble(stages: int, microbatches: int) -> None:
    assert seconds_of_1f1b([1.0] * microbatches, stages) == 3 * (microbatches + stages - 1)


def test_arithmetic_of_unequal_microbatches() -> None:
    # Forward of the long one; both its passes on the last stage; its way back, which the short one waits for; that one.
    assert seconds_of_1f1b([3.0, 1.0]) == 3 + 3 * 3 + 2 * 3 + 2 * 1
    # Two steps of two microbatches of one row each, longest first: 1F1B pads 1 to 3 tokens, and 2 to 2.
    ids = [[5, 6, 7], [5], [5, 6], [5, 6]]
    columns = {"input_ids": ids, "labels": ids, "length": [3, 1, 2, 2], "num_targets": [2, 0, 1, 1]}
    sampler = MicrobatchSampler(
        TokenizedRows(Dataset.from_dict(columns), "rows", {}),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        shuffle=False,
        seed=0,
        pad_token_id=0,
    )
    sums = figures(sampler, 2)
    assert sums == {"real": 8, "own": 8, "alike": 10, "1F1B own": 20 + 18, "1F1B alike": 27 + 18, "local": 24}

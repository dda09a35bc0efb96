"""The short form of `tests/runs/faults/harness.py`: each kind of fault once."""

from pathlib import Path

import pytest
from faults.harness import run_trial
from faults.kinds import FAULTS, reason_not_possible
from faults.testbed import Testbed


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Testbed:
    return Testbed(tmp_path_factory.mktemp("testbed"))


@pytest.mark.parametrize("kind", FAULTS)
def test_no_run_is_lost(kind: str, testbed: Testbed, tmp_path: Path) -> None:
    if why := reason_not_possible(kind, tmp_path):
        pytest.skip(why)
    trial = run_trial(testbed, kind, number=0, seed=1)
    assert not trial.lost, trial

"""The short form of `tests/runs/faults/harness.py`: each kind of fault once."""

from pathlib import Path

import pytest
from faults.ground import Ground
from faults.harness import run_trial
from faults.kinds import FAULTS, reason_not_possible


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("kind", FAULTS)
def test_no_run_is_lost(kind: str, ground: Ground, tmp_path: Path) -> None:
    if why := reason_not_possible(kind, tmp_path):
        pytest.skip(why)
    trial = run_trial(ground, kind, number=0, seed=1)
    assert not trial.lost, trial

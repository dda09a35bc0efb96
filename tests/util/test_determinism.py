"""`--full_determinism` is PyTorch's own setting for the time of a run, and says which operator it has no kernel for."""

import pytest
import torch

from lopt_pp.errors import LoptError
from lopt_pp.util import determinism
from lopt_pp.util.determinism import full_determinism


def settings() -> tuple[object, ...]:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic, fills


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in determinism._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # So that it is put back at the end.
        monkeypatch.delenv(name)
    return monkeypatch


def test_it_lasts_as_long_as_the_run(environment: pytest.MonkeyPatch) -> None:
    before = settings()
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with full_determinism(True):
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert determinism.os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
        assert determinism.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own stays"
        assert "CUDA_LAUNCH_BLOCKING" not in determinism.os.environ
    assert settings() == before
    with full_determinism(False):
        assert settings() == before and not torch.are_deterministic_algorithms_enabled()


def test_an_operator_without_a_deterministic_kernel_is_named() -> None:
    before = settings()
    said = "^--full_determinism: .* put_ does not have a deterministic .* leave the flag"
    with pytest.raises(LoptError, match=said), full_determinism(True):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    assert settings() == before


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), full_determinism(True):
        torch.zeros(2, 3) @ torch.zeros(2, 3)

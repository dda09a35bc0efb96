"""A hub to push to, which `huggingface_hub` in this process asks instead of the real one."""

from collections.abc import Iterator

import pytest
from hub_server import Hub, serving
from huggingface_hub import constants


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One that knows the user of this process, who may write."""
    with serving() as served:
        # What the library has read from HF_ENDPOINT, HF_HUB_OFFLINE and HF_HUB_DISABLE_XET when it was imported. (Its
        # other way of uploading, by hf_xet, has a storage of its own.)
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # And for processes that this one starts.
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        yield served

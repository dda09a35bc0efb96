"""The groups that the processes of a run talk in."""

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import ranks

from lopt_pp.distributed.groups import GROUP_TIMEOUT, join_groups

HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def test_all_groups_have_the_stated_limit_also_those_of_all_processes(tmp_path: Path) -> None:
    """A mesh of torch's would hand out the default group here, and give the others limits of torch's own."""
    with ranks(tmp_path, [tmp_path, "cpu"], [tmp_path, "cpu"], module="groups_worker") as started:
        assert [rank.status(60) for rank in started] == [0, 0], [rank.text for rank in started]
    limit = GROUP_TIMEOUT.total_seconds()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "store": limit,
            "replicas: default": [limit, [0, 1]],
            "replicas: replicas": [limit, [0, 1]],
            "replicas: pipeline": [limit, [rank]],
            "pipeline: default": [limit, [0, 1]],
            "pipeline: replicas": [limit, [rank]],
            "pipeline: pipeline": [limit, [0, 1]],
        }


def test_a_machine_without_a_gpu_is_an_error_in_all_processes_before_they_make_groups(tmp_path: Path) -> None:
    with ranks(tmp_path, [tmp_path, "cpu"], [tmp_path, "cuda"], module="groups_worker") as started:
        assert [rank.status(60) for rank in started] == [1, 1], [rank.text for rank in started]
        for rank in started:
            assert "LoptError: rank 0" in rank.text and "on a GPU (NVIDIA H200) over NCCL" in rank.text, rank.text


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_nccl_does_not_abort_a_process_that_still_has_weights_to_save(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its watchdog does by default when a peer is gone. What the user has set stays."""
    made: list[str] = []
    monkeypatch.setenv(HANDLING, "")
    monkeypatch.delenv(HANDLING)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: made.append(os.environ.get(HANDLING, "default")))
    join_groups(backend, dist.HashStore(), 0, 2)
    monkeypatch.setenv(HANDLING, "1")
    join_groups(backend, dist.HashStore(), 0, 2)
    assert made == ["0" if backend == "nccl" else "default", "1"]

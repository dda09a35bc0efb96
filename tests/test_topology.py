"""Which process holds which stages."""

import pytest

from lopt_pp.errors import LoptError
from lopt_pp.topology import PipelineConfig, Topology

LAYOUTS = [(stages, processes) for stages in range(1, 9) for processes in range(1, stages + 1)]


@pytest.mark.parametrize(("num_stages", "num_processes"), LAYOUTS)
def test_every_stage_has_one_process_and_the_order_is_kept(num_stages: int, num_processes: int) -> None:
    topology = Topology(num_stages, num_processes)
    held = [list(topology.stages_of(rank)) for rank in range(num_processes)]
    assert [stage for stages in held for stage in stages] == list(range(num_stages))
    assert all(held), "a process without a stage"
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert all(stage in held[topology.rank_of(stage)] for stage in range(num_stages))


def test_two_stages_on_one_process_and_on_two() -> None:
    assert list(Topology(2, 1).stages_of(0)) == [0, 1]
    assert [list(Topology(2, 2).stages_of(rank)) for rank in range(2)] == [[0], [1]]


@pytest.mark.parametrize("num_processes", [0, 3, 8])
def test_processes_that_do_not_fit(num_processes: int) -> None:
    with pytest.raises(
        LoptError, match=rf"^{num_processes} processes do not fit --num_stages 2: start 1 to 2 \(torchrun --nproc"
    ):
        Topology(2, num_processes)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("num_stages", 0, "at least 1"),
        ("queue_depth", 0, "at least 1"),
        ("stream_timeout", 0.0, "a number of seconds above 0"),
        ("stream_timeout", -1.0, "a number of seconds above 0"),
        ("backend", "mpi", "expected auto, nccl, gloo"),
    ],
)
def test_config_values(flag: str, value: int | float | str, expected: str) -> None:
    with pytest.raises(LoptError, match=f"^--{flag} .*{expected}"):
        PipelineConfig(**{flag: value})  # type: ignore[arg-type]

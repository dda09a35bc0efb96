"""Which process holds which stages."""

import pytest

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.topology import Topology
from lopt_pp.errors import LoptError

LAYOUTS = [(stages, processes) for stages in range(1, 9) for processes in range(1, stages + 1)]


@pytest.mark.parametrize(("num_stages", "num_processes"), LAYOUTS)
def test_every_stage_has_one_process_and_the_order_is_kept(num_stages: int, num_processes: int) -> None:
    topology = Topology(num_stages, num_processes)
    owned = [list(topology.stages_of(rank)) for rank in range(num_processes)]
    assert [stage for stages in owned for stage in stages] == list(range(num_stages))
    assert all(owned), "a process without a stage"
    assert max(map(len, owned)) - min(map(len, owned)) <= 1
    assert all(stage in owned[topology.rank_of(stage)] for stage in range(num_stages))


def test_two_stages_on_one_process_and_on_two() -> None:
    assert list(Topology(2, 1).stages_of(0)) == [0, 1]
    assert [list(Topology(2, 2).stages_of(rank)) for rank in range(2)] == [[0], [1]]


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ({}, 1, (2, 1, 1)),
        ({}, 2, (2, 2, 1)),
        ({}, 8, (2, 2, 4)),
        ({"num_stages": 1}, 4, (1, 1, 4)),
        ({"num_stages": 4}, 2, (4, 2, 1)),
        ({"num_stages": 4, "data_parallel": 2}, 4, (4, 2, 2)),
        ({"num_stages": 4, "pipeline_processes": 1}, 3, (4, 1, 3)),
        ({"num_stages": 4, "pipeline_processes": 2, "data_parallel": 2}, 4, (4, 2, 2)),
    ],
)
def test_layout_by_flags(flags: dict[str, int], world_size: int, expected: tuple[int, int, int]) -> None:
    assert PipelineConfig(**flags).topology(world_size) == Topology(*expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ({}, 3),
        ({"num_stages": 4}, 6),
        ({"data_parallel": 2}, 3),
        ({"data_parallel": 2}, 1),
        ({"data_parallel": 1}, 4),
        ({"pipeline_processes": 3}, 3),
        ({"pipeline_processes": 2}, 1),
        ({"pipeline_processes": 2, "data_parallel": 2}, 2),
    ],
)
def test_processes_that_do_not_fit(flags: dict[str, int], world_size: int) -> None:
    given = "".join(f" --{name} {number}" for name, number in flags.items() if name != "num_stages")
    stages = flags.get("num_stages", 2)
    with pytest.raises(LoptError, match=rf"^{world_size} process(es)? do(es)? not fit --num_stages {stages}{given}: "):
        PipelineConfig(**flags).topology(world_size)  # type: ignore[arg-type]


def test_end_to_end_has_one_block_in_each_process() -> None:
    assert PipelineConfig(num_stages=4).topology(2, end_to_end=True) == Topology(2, 2, 1)


def test_replicas_of_a_stage_have_neighbouring_ranks() -> None:
    topology = Topology(num_stages=4, num_processes=2, num_replicas=3)
    assert topology.world_size == 6
    assert [list(topology.stages_of(rank)) for rank in range(6)] == [[0, 1]] * 3 + [[2, 3]] * 3
    assert [topology.replica_of(rank) for rank in range(6)] == [0, 1, 2, 0, 1, 2]
    assert [[topology.rank_of(stage, replica) for stage in range(4)] for replica in range(3)] == [
        [0, 0, 3, 3],
        [1, 1, 4, 4],
        [2, 2, 5, 5],
    ]
    assert topology.name_of(4) == "stages 2, 3 of replica 1 (rank 4)"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"split": "middle"}, "^--split middle: midpoint, auto, or layer numbers"),
        ({"split": "6,4", "num_stages": 3}, "^--split 6,4: layer numbers above 0 that ascend"),
        ({"split": "0"}, "^--split 0: layer numbers above 0 that ascend"),
        ({"split": "4,6"}, "^--split 4,6 makes 3 stages; --num_stages is 2"),
        ({"data_parallel": 0}, "^--data_parallel 0: at least 1"),
        ({"sharding": "some"}, "^--sharding: invalid choice: 'some' .*none, full"),
    ],
)
def test_layout_flags_that_say_nothing(flags: dict[str, int | str], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        PipelineConfig(**flags)  # type: ignore[arg-type]


def test_boundaries() -> None:
    assert PipelineConfig(split="4,6", num_stages=3).boundaries == [4, 6]
    assert PipelineConfig().boundaries is None


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("num_stages", 0, "at least 1"),
        ("queue_depth", 0, "at least 1"),
        ("stream_timeout", 0.0, "a number of seconds above 0"),
        ("stream_timeout", -1.0, "a number of seconds above 0"),
        ("backend", "mpi", "choose from auto, nccl, gloo"),
    ],
)
def test_config_values(flag: str, value: int | float | str, expected: str) -> None:
    with pytest.raises(LoptError, match=f"^--{flag}:? .*{expected}"):
        PipelineConfig(**{flag: value})  # type: ignore[arg-type]

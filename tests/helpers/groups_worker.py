"""One of the two processes of tests/distributed/test_groups.py: `main([folder, device])`, by the environment's rank.

With a device `cuda` the process takes itself for one with a GPU, and only tries to join the other.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.topology import Topology
from lopt_pp.distributed import world
from lopt_pp.distributed.devices import Placement
from lopt_pp.distributed.groups import pipeline_group, replica_mesh
from lopt_pp.distributed.world import connect

LAYOUTS = {"replicas": Topology(1, 1, 2), "pipeline": Topology(2, 2)}


def main(arguments: Sequence[str]) -> int:
    folder, device = arguments
    if device == "cuda":
        gpu = Placement("cuda:0", "nccl", name="NVIDIA H200", uuid="GPU-a")
        with mock.patch.object(world, "choose_device", lambda backend, local_rank: gpu):
            return write_limits(Path(folder))
    return write_limits(Path(folder))


def write_limits(folder: Path) -> int:
    """Writes, for each layout, the limit of each group in seconds and the ranks that are in it."""
    found: dict[str, Any] = {}
    with connect(PipelineConfig()) as joined:
        default = dist.group.WORLD
        assert default is not None
        found["store"] = joined.store.timeout.total_seconds()  # type: ignore[attr-defined]  # The stubs lack it.
        for name, topology in LAYOUTS.items():
            replicas, pipeline = replica_mesh(joined.device, topology).get_group(), pipeline_group(topology)
            for kind, group in ("default", default), ("replicas", replicas), ("pipeline", pipeline):
                limit = group._get_backend(torch.device("cpu")).options._timeout
                found[f"{name}: {kind}"] = [limit.total_seconds(), dist.get_process_group_ranks(group)]
    Path(folder, f"{joined.rank}.json").write_text(json.dumps(found))
    return 0

"""One of the two processes of tests/distributed/test_groups.py: `main([folder])`, by the environment's rank."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.topology import Topology
from lopt_pp.distributed.groups import pipeline_group, replica_mesh
from lopt_pp.distributed.world import connect

LAYOUTS = {"replicas": Topology(1, 1, 2), "pipeline": Topology(2, 2)}


def main(arguments: Sequence[str]) -> int:
    """Writes, for each layout, the limit of each group in seconds and the ranks that are in it."""
    found = {}
    with connect(PipelineConfig()) as world:
        default = dist.group.WORLD
        assert default is not None
        for name, topology in LAYOUTS.items():
            replicas, pipeline = replica_mesh(world.device, topology).get_group(), pipeline_group(topology)
            for kind, group in ("default", default), ("replicas", replicas), ("pipeline", pipeline):
                limit = group._get_backend(torch.device("cpu")).options._timeout
                found[f"{name}: {kind}"] = [limit.total_seconds(), dist.get_process_group_ranks(group)]
    Path(arguments[0], f"{world.rank}.json").write_text(json.dumps(found))
    return 0

"""Joins neighbouring processes: the boundaries that a process is at."""

from datetime import timedelta

import torch.distributed as dist

from lopt_pp.config.topology import Topology
from lopt_pp.distributed.world import World
from lopt_pp.pipeline.stream import Boundary


def boundaries(world: World, topology: Topology, timeout: float) -> dict[int, Boundary]:
    """The boundaries between processes that this process stands at, by the stage that sends. All must call this.

    One group carries all streams, as messages between two processes each: making a group takes all processes, so one
    for every boundary and replica would take long where there are many. It is not the default group, whose connections
    are watched for as long as the run lasts and must outlive a time-out of the stream.
    """
    if world.size == 1:
        return {}
    headers = dist.new_group(backend="gloo")
    payload = headers
    if world.payload_backend == "nccl":
        # NCCL gives each pair of processes a CUDA stream of its own, so transfers overlap with the computation.
        payload = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout))
    replica, own = topology.replica_of(world.rank), {}
    for stage in range(topology.num_stages - 1):
        source, target = topology.rank_of(stage, replica), topology.rank_of(stage + 1, replica)
        if source != target and world.rank in (source, target):
            own[stage] = Boundary(source, target, stage, headers, payload, world.device, timeout)
    return own

"""The groups that the processes of a run talk in, all with one limit of time.

PyTorch has limits of its own for groups that are given none (10 minutes over NCCL, 30 over gloo), and a mesh hands out
the default group where a dimension has all processes. So groups are made here, one by one.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lopt_pp.config.topology import Topology

GROUP_TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others of a group, or for their word in the store. It only ends a run that hangs
where no stream is waited for, since a process that dies is noticed at once; so it is longer than anything that a
healthy run waits for, and than `--stream_timeout` by default, whose message names the stage that hangs."""


def join_groups(payload_backend: str, store: dist.Store, rank: int, size: int) -> None:
    """Makes the default group, of all processes. All must call this.

    Args:
        payload_backend: `nccl` or `gloo`.
        store: for this alone.
        rank: of this process.
        size: number of processes.
    """
    # Gloo carries headers and what is told between processes; NCCL what lives on GPUs.
    backend = "cpu:gloo,cuda:nccl" if payload_backend == "nccl" else "gloo"
    if payload_backend == "nccl":
        # By default NCCL's watchdog aborts the process as soon as a peer is gone, before the last good weights are
        # saved and the reason is told. Whoever waits for the message, and our own watchdog, hear of it as well.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # Never with `device_id`: NCCL would make its communicators at once, and put all that a process sends and receives
    # on one CUDA stream; see `lopt_pp.pipeline.boundary.boundaries`.
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)


def replica_mesh(device: torch.device, topology: Topology) -> DeviceMesh:
    """The processes that hold the same stages as this one, as a mesh of one dimension. All processes must call this."""
    first_ranks = range(0, topology.world_size, topology.num_replicas)
    group = _own_group([range(first, first + topology.num_replicas) for first in first_ranks], "replicas")
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=("replica",))


def pipeline_group(topology: Topology) -> dist.ProcessGroup:
    """The processes of this one's replica of the pipeline, in the order of their stages. All must call this."""
    return _own_group([topology.ranks_of_replica(replica) for replica in range(topology.num_replicas)], "pipeline")


def _own_group(parts: list[range], name: str) -> dist.ProcessGroup:
    """Makes a group of each part of the processes, and returns the one that this process is in."""
    rank, own = dist.get_rank(), None
    for ranks in parts:
        group = dist.new_group(list(ranks), timeout=GROUP_TIMEOUT, group_desc=name)
        if rank in ranks:
            own = group
    assert own is not None
    return own

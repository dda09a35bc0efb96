"""The boundary between two neighbouring processes: who they are, and the groups that they talk in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lopt_pp.config.topology import Topology
from lopt_pp.distributed.world import World
from lopt_pp.errors import StreamError
from lopt_pp.pipeline.messages import Header


@dataclass(frozen=True)
class Boundary:
    """Two neighbouring processes and the groups that they talk in.

    Attributes:
        source: rank of the process that sends.
        target: rank of the process that receives.
        stage: the stage that sends; `stage + 1` receives.
        headers: gloo group that has the two.
        payload: group that has the two, on the payload's backend; may be the same.
        device: where the payload lives.
        timeout: seconds to wait for the neighbour.
    """

    source: int
    target: int
    stage: int
    headers: dist.ProcessGroup
    payload: dist.ProcessGroup
    device: torch.device
    timeout: float

    def send(self, tensor: torch.Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        """Begins to send a tensor to the target."""
        with self._naming(self.target, "sending"):
            work = dist.isend(tensor, self.target, group, tag=tag)
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, group: dist.ProcessGroup, tag: int) -> dist.Work:
        """Begins to receive a tensor from the source."""
        with self._naming(self.source, "receiving"):
            work = dist.irecv(tensor, self.source, group, tag=tag)
        assert work is not None
        return work

    def wait(self, work: dist.Work, on: str, peer: int, header: Header | None) -> None:
        """Waits for `work`, and says which neighbour let it fail."""
        with self._naming(peer, on if header is None else f"{on} at {header}"):
            work.wait(timedelta(seconds=self.timeout))

    @contextmanager
    def _naming(self, peer: int, on: str) -> Iterator[None]:
        """Says which neighbour lets something fail. A connection that has broken fails at once, not when waited for."""
        try:
            yield
        except RuntimeError as error:
            stage = self.stage if peer == self.source else self.stage + 1
            hangs = "timed out" in str(error).lower()
            fault = f"does not answer for {self.timeout:g} s (--stream_timeout)" if hangs else "has died or left"
            raise StreamError(f"stage {stage} (rank {peer}) {fault}: {on} failed") from error


def boundaries(world: World, topology: Topology, timeout: float) -> dict[int, Boundary]:
    """The boundaries between processes that this process is at, by the stage that sends. All must call this.

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

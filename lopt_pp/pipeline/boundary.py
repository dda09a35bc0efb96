"""The boundary between two neighbouring processes: who they are, and the groups that they talk in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lopt_pp.config.topology import Topology
from lopt_pp.distributed.groups import GROUP_TIMEOUT
from lopt_pp.distributed.transport_errors import cause_of, peer_is_gone
from lopt_pp.distributed.world import World
from lopt_pp.errors import StreamError
from lopt_pp.pipeline.messages import Header
from lopt_pp.pipeline.transfer import Transfer
from lopt_pp.util.compat_torch import nccl_options, unprofiled
from lopt_pp.util.threads import result_in_time

_ENDLESS = timedelta(days=3650)
"""The limit of the payloads' group, unlike that of all others: `Transfer.wait` has the time of `--stream_timeout`, and
NCCL's own watchdog, which counts from when a message was posted and ends the process, must not come before it."""

_NCCL_CTAS = 2
"""Thread blocks of a transfer at most. A receive that waits for its message spins, and keeps as many multiprocessors
from computing; a boundary moves one tensor for a whole block's forward and backward, for which these are enough."""

_WARM_UP_TAG = 3


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

    def send(self, tensor: torch.Tensor, group: dist.ProcessGroup, tag: int) -> Transfer:
        """Begins to send a tensor to the target."""
        with self._naming(self.target, "sending"), unprofiled():
            work = dist.isend(tensor, self.target, group, tag=tag)
        assert work is not None
        return Transfer(work, is_polled=group is not self.headers)

    def receive(self, tensor: torch.Tensor, group: dist.ProcessGroup, tag: int) -> Transfer:
        """Begins to receive a tensor from the source."""
        with self._naming(self.source, "receiving"), unprofiled():
            work = dist.irecv(tensor, self.source, group, tag=tag)
        assert work is not None
        return Transfer(work, is_polled=group is not self.headers)

    def wait(self, transfer: Transfer, on: str, peer: int, header: Header | None) -> None:
        """Waits for a message, and says which neighbour it was exchanged with if it fails.

        Raises:
            StreamError: it failed, with the cause, or takes longer than `timeout`.
        """
        with self._naming(peer, on if header is None else f"{on} at {header}"):
            transfer.wait(self.timeout)

    def warm_up(self, rank: int) -> None:
        """Exchanges a message of nothing, so that all that the first one makes is made. Both ends must call this.

        Args:
            rank: of this process, one of the two.
        """
        sends = rank == self.source
        peer, nothing = self.target if sends else self.source, torch.zeros(1, device=self.device)

        def post() -> Transfer:
            if nothing.is_cuda:
                torch.cuda.set_device(self.device)  # A thread begins with the first one.
            return (self.send if sends else self.receive)(nothing, self.payload, _WARM_UP_TAG)

        # NCCL makes the connection of a pair at its first message, and does not return before the other end does too.
        with self._naming(peer, "connecting"):
            transfer = result_in_time(post, self.timeout)
        self.wait(transfer, "connecting", peer, None)

    @contextmanager
    def _naming(self, peer: int, on: str) -> Iterator[None]:
        """Says which neighbour something failed with, and why. What is broken already fails when it is posted."""
        here, there = self._name(self.source), self._name(self.target)
        if peer == self.source:
            here, there = there, here
        try:
            yield
        except TimeoutError as error:
            raise StreamError(
                f"{there} does not answer for {self.timeout:g} s (--stream_timeout): {on} failed"
            ) from error
        except RuntimeError as error:
            cause = cause_of(error)
            if peer_is_gone(error):
                raise StreamError(f"{there} has died or left: {on} failed: {cause}") from error
            raise StreamError(f"{here}, with {there}: {on} failed: {cause}") from error

    def _name(self, rank: int) -> str:
        return f"stage {self.stage if rank == self.source else self.stage + 1} (rank {rank})"


def boundaries(world: World, topology: Topology, timeout: float) -> dict[int, Boundary]:
    """The boundaries between processes that this process is at, by the stage that sends. All must call this.

    One group carries all streams, as messages between two processes each: making a group takes all processes, so one
    for every boundary and replica would take long where there are many. It is not the default group, whose connections
    are watched for as long as the run lasts and must outlive a time-out of the stream.

    Raises:
        StreamError: NCCL cannot connect this process with a neighbour.
    """
    if world.size == 1:
        return {}
    headers = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    payload = headers
    if is_nccl := world.payload_backend == "nccl":
        # NCCL gives each pair of processes a CUDA stream of its own, at the first message. It must: a group that is
        # given `device_id`, here or where the default group is made, has one stream for all pairs of a process, on
        # which what a middle stage sends would stand behind the receives that it has posted before.
        payload = dist.new_group(backend="nccl", timeout=_ENDLESS, pg_options=nccl_options(_ENDLESS, _NCCL_CTAS))
    replica, own = topology.replica_of(world.rank), dict[int, Boundary]()
    for stage in range(topology.num_stages - 1):
        source, target = topology.rank_of(stage, replica), topology.rank_of(stage + 1, replica)
        if source != target and world.rank in (source, target):
            own[stage] = Boundary(source, target, stage, headers, payload, world.device, timeout)
    # Every second boundary, then the others: no process is at two of either, so none waits for one that waits itself.
    for boundary in sorted(own.values(), key=lambda boundary: boundary.source // topology.num_replicas % 2):
        if is_nccl:
            boundary.warm_up(world.rank)
    return own

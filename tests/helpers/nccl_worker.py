"""The trainer on CPUs, with NCCL imitated for what crosses a boundary: see `nccl_imitation`.

Stage 0 makes its second step only when stage 1 waits for the message after it: what is then saved is saved while a
message is waited for that never comes.
"""

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu_imitation import Device
from nccl_imitation import NcclGroup, NcclOptions, Network, Work
from ranks import until

import lopt_pp.train
import lopt_pp.training.run as whole_run
from lopt_pp.stage.stage import Stage

MESSAGES = 5
"""Of two steps of two microbatches, and the one that connects the pair."""
_TOKEN, _DATA = 11, 12


class GlooNetwork(Network):
    """Joins ranks that are processes, by gloo."""

    group: dist.ProcessGroup
    isend, irecv = staticmethod(dist.isend), staticmethod(dist.irecv)

    def make_communicator(self, pair: tuple[int, int]) -> None:
        """The first message waits for the other side by itself."""

    def send(self, tensor: torch.Tensor, source: int, target: int, number: int) -> None:
        self._do(self.irecv(torch.zeros(1), target, self.group, tag=_TOKEN))
        self._do(self.isend(tensor, target, self.group, tag=_DATA))

    def receive(self, tensor: torch.Tensor, source: int, target: int, number: int) -> None:
        self._do(self.isend(torch.zeros(1), source, self.group, tag=_TOKEN))
        self._do(self.irecv(tensor, source, self.group, tag=_DATA))

    def _do(self, work: dist.Work | None) -> None:
        assert work is not None
        try:
            work.wait()
        except RuntimeError:
            threading.Event().wait()  # A kernel of NCCL's waits on where the other side has left.


def main(arguments: Sequence[str]) -> int:
    device, network = Device(), GlooNetwork()
    rank, waits = int(os.environ["RANK"]), Path(arguments[arguments.index("--output_dir") + 1]).parent / "waits"
    nccl = NcclGroup(network, rank, device)
    new_group, connect, cpu, step = dist.new_group, whole_run.connect, torch.Tensor.cpu, Stage.step

    def make_group(ranks: Any = None, *, backend: str | None = None, pg_options: object = None, **more: Any) -> Any:
        if backend != "nccl":
            return new_group(ranks, backend=backend, **more)
        network.group = new_group(backend="gloo")
        return nccl

    def post(original: Any, sends: bool) -> Any:
        def posted(tensor: torch.Tensor, peer: int, group: Any = None, tag: int = 0) -> Any:
            if group is not nccl:
                return original(tensor, peer, group, tag=tag)
            work = nccl.post(tensor, *((rank, peer) if sends else (peer, rank)), tag)
            if not sends:
                received.append(work)
            return work

        return posted

    received: list[Work] = []

    def waiting_step(self: Stage, number: int) -> dict[str, float]:
        if self.index == 0 and number == 1:
            until(waits.exists)
        return step(self, number)

    def tell() -> None:
        until(lambda: len(received) > MESSAGES, 60)
        if received[MESSAGES].waited_for.wait(60):
            waits.touch()

    def on_stream(tensor: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        device.current_stream.synchronize()
        return cpu(tensor, *given, **more)

    def over_nccl(setup: Any, world: Any, *more: Any) -> Any:
        return connect(setup, dataclasses.replace(world, payload_backend="nccl"), *more)

    if rank == 1:
        threading.Thread(target=tell, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "ProcessGroupNCCL", NcclOptions, raising=False)
        patch.setattr(dist, "new_group", make_group)
        patch.setattr(dist, "isend", post(dist.isend, sends=True))
        patch.setattr(dist, "irecv", post(dist.irecv, sends=False))
        patch.setattr(torch.Tensor, "cpu", on_stream)
        patch.setattr(Stage, "step", waiting_step)
        patch.setattr(whole_run, "connect", over_nccl)
        return lopt_pp.train.main(arguments)

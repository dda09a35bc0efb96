"""This project as a method of the pipeline benchmark, with its stream, and its stages alone without one."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist

from benchmarks.speed.shared_model import PROCESSES, Cut, SharedModel, Trial
from lopt_pp.config.topology import Topology
from lopt_pp.metrics.records import COMPUTE_PHASES, Record
from lopt_pp.objectives import ObjectiveConfig
from lopt_pp.pipeline.boundary import boundaries
from lopt_pp.pipeline.stream import Receiver, Sender, StreamReceiver, StreamSender
from lopt_pp.training.loop import train
from lopt_pp.training.phases import LocalTraining
from lopt_pp.training.segment import Segment
from lopt_pp.training.step_plan import StepPlan

QUEUE_DEPTH = 2
TIMEOUT = 600.0


class LocalLearning:
    """This project: the real stage, stream and loop.

    The part that counts begins when the last stage is given its first hidden states, and ends when it is given those
    that follow the last step that counts: a pipeline fills once in a run and not in every step. Two more microbatches
    come after, so that both stages work to the end of it.
    """

    num_blocks: ClassVar[int] = 2
    label: ClassVar[str] = "LoPT-PP"

    def __init__(self, shared: SharedModel, cut: Cut, objective: ObjectiveConfig | None = None) -> None:
        self._shared = shared
        self._stage = shared.stage(cut, objective or ObjectiveConfig())

    def run(self, microbatches: int, steps: int) -> Trial:
        stage, sampler = self._stage, self._shared.sampler(microbatches, steps, more=2)
        num_steps = sampler.steps_per_epoch
        receivers: dict[int, Receiver] = {}
        senders: dict[int, Sender] = {}
        ends = boundaries(self._shared.world, Topology(PROCESSES, PROCESSES), TIMEOUT)
        plan = StepPlan(sampler, [LocalTraining(sampler)])
        headers = plan.headers(range(num_steps), stage, boundary=0)
        dist.barrier()
        begin = self._shared.now()
        if self._shared.rank == 0:
            senders[0] = StreamSender(ends[0], headers, QUEUE_DEPTH)
        else:
            receiver = StreamReceiver(ends[0], headers, QUEUE_DEPTH)
            receivers[1] = noting = _Noting(receiver, self._shared, (0, microbatches * steps))
        train(Segment([stage], receivers, senders), plan, range(num_steps), lambda record: None)
        dist.barrier()
        for group in {ends[0].headers, ends[0].payload}:
            dist.destroy_process_group(group)
        return Trial(begin, begin) if self._shared.rank == 0 else Trial(*noting.times)


class _Noting:
    """A receiver that notes when the messages with the numbers `wanted` were given to the stage."""

    def __init__(self, receiver: Receiver, shared: SharedModel, wanted: Sequence[int]) -> None:
        self._receiver = receiver
        self._shared = shared
        self._wanted = wanted
        self._received = 0
        self.times: list[float] = []

    def receive(self) -> torch.Tensor:
        hidden_states = self._receiver.receive()
        if self._received in self._wanted:
            self.times.append(self._shared.now())
        self._received += 1
        return hidden_states

    def close(self) -> None:
        self._receiver.close()


class Computing:
    """The same stages without the stream: each trains on hidden states that are there already.

    Both processes work at the same time, as in the pipeline, since cores that share caches and memory slow each other;
    with `in_turn` one after the other.
    """

    num_blocks: ClassVar[int] = 2
    label: ClassVar[str] = "computing"

    def __init__(self, shared: SharedModel, cut: Cut, in_turn: bool = False) -> None:
        self._shared = shared
        self._in_turn = in_turn
        self._stage = shared.stage(cut, ObjectiveConfig())

    def run(self, microbatches: int, steps: int) -> Trial:
        if not self._in_turn:
            dist.barrier()
            return self._train(microbatches, steps, more=2)
        for rank in range(PROCESSES):
            dist.barrier()
            if rank == self._shared.rank:
                trial = self._train(microbatches, steps, more=0)
        dist.barrier()
        return trial

    def _train(self, microbatches: int, steps: int, more: int) -> Trial:
        shared, stage, records = self._shared, self._stage, list[Record]()
        sampler = shared.sampler(microbatches, steps, more)
        shape = shared.shape.rows, shared.shape.tokens, shared.config.hidden_size
        hidden_states = torch.randn(shape).to(shared.device, shared.dtype)
        receivers: dict[int, Receiver] = {1: _Endless(hidden_states)} if shared.rank == 1 else {}
        senders: dict[int, Sender] = {0: _Dropping()} if shared.rank == 0 else {}
        begin = shared.now()
        plan = StepPlan(sampler, [LocalTraining(sampler)])
        train(Segment([stage], receivers, senders), plan, range(sampler.steps_per_epoch), records.append)
        records = records[:steps]
        optimizer = sum(record["optimizer_seconds"] for record in records)
        computing = sum(record[f"{phase}_seconds"] for record in records for phase in COMPUTE_PHASES)
        microbatch = (computing - optimizer) / (microbatches * steps)
        return Trial(begin, shared.now(), microbatch, optimizer / steps)


class _Endless:
    """Gives the same hidden states again and again."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self._hidden_states = hidden_states

    def receive(self) -> torch.Tensor:
        return self._hidden_states

    def close(self) -> None:
        pass


class _Dropping:
    """Takes hidden states to nowhere."""

    def send(self, hidden_states: torch.Tensor) -> None:
        pass

    def close(self) -> None:
        pass

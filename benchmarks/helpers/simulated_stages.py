"""Stages whose compute is a fixed sleep, trained by LoPT-PP's own loop and by `torch.distributed.pipelining`.

A sleep takes the same time on every stage and needs no core, so that many stages run truly side by side on a small
machine, and what a run takes beyond its sleeps is the schedule's and the transport's alone.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from lopt_pp.config.topology import Topology
from lopt_pp.data import TokenCounts
from lopt_pp.distributed.world import World
from lopt_pp.pipeline.boundary import boundaries
from lopt_pp.pipeline.messages import Header
from lopt_pp.pipeline.stream import StreamReceiver, StreamSender
from lopt_pp.stage.stage import Stage
from lopt_pp.training.loop import train
from lopt_pp.training.phases import LocalTraining
from lopt_pp.training.segment import Segment
from lopt_pp.training.step_plan import StepPlan

Times = dict[str, Any]
"""What a stage says of its run; see `run_ours` and `run_peer`."""


@dataclass(frozen=True)
class Load:
    """What every stage does.

    Attributes:
        forward: seconds of a microbatch's forward.
        backward: seconds of its backward.
        optimizer: seconds of an optimizer step.
        microbatches: per step.
        shape: of the hidden states that cross a boundary per microbatch, `(sequences, tokens, hidden)`, in float32.
    """

    forward: float
    backward: float
    optimizer: float
    microbatches: int
    shape: tuple[int, int, int]

    @property
    def step(self) -> float:
        """Seconds that a stage sleeps in a step."""
        return self.microbatches * (self.forward + self.backward) + self.optimizer

    @property
    def microbatch(self) -> float:
        """Seconds per microbatch, its share of the optimizer step included."""
        return self.step / self.microbatches

    @property
    def bytes(self) -> int:
        """Of the hidden states of one microbatch."""
        sequences, tokens, hidden = self.shape
        return 4 * sequences * tokens * hidden


class _Batch:
    """A microbatch with nothing in it."""

    num_tokens = num_targets = 1

    def to(self, device: torch.device) -> "_Batch":
        return self


class _Sampler:
    """A sampler of such microbatches."""

    def __init__(self, microbatches: int) -> None:
        self._batches = [_Batch()] * microbatches

    def microbatches(self, step: int) -> list[_Batch]:
        return self._batches

    def counts(self, step: int, indices: Sequence[int] | None = None) -> TokenCounts:
        return TokenCounts(1, 1)

    def microbatches_with_rows(self, step: int, indices: Sequence[int] | None = None) -> float:
        return 1.0

    def epoch(self, step: int) -> float:
        return 0.0

    def unusable(self, step: int) -> None:
        return None


class _Stage:
    """Has the methods of `lopt_pp.stage.stage.Stage` that the training loop calls, and sleeps in them."""

    device = torch.device("cpu")
    dtype = torch.float32
    objective = None
    _measures = False
    _ddp = ()
    run_microbatch = Stage.run_microbatch

    def __init__(self, index: int, load: Load) -> None:
        self.index = index
        self._load = load
        self._hidden_states = torch.zeros(load.shape)
        self.received: list[float] = []

    def learned_microbatches(self, step: int, num_microbatches: int) -> Sequence[int]:
        return range(num_microbatches)

    def begin_step(self, num_learned: float) -> None:
        """There is no router to balance."""

    def router_record(self) -> dict[str, float]:
        return {}

    def token_record(self, num_targets: int) -> dict[str, float]:
        return {}

    def count(self, counts: TokenCounts) -> int:
        return 1

    def forward(self, batch: _Batch, hidden_states: torch.Tensor | None, learns: bool) -> torch.Tensor:
        self.received.append(time.perf_counter())
        time.sleep(self._load.forward)
        return self._hidden_states

    def outgoing(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def loss(self, output: torch.Tensor, batch: _Batch, step_count: int) -> "_Stage":
        return self

    def backward(self) -> None:
        time.sleep(self._load.backward)

    def step(self, step: int) -> dict[str, float]:
        time.sleep(self._load.optimizer)
        return {}


def _headers(load: Load, steps: int) -> Iterator[Header]:
    for step in range(steps):
        for microbatch in range(load.microbatches):
            yield Header(step, microbatch, *load.shape)


def run_ours(world: World, num_stages: int, load: Load, steps: int, queue_depth: int) -> Times | None:
    """Trains one sleeping stage in this process by `lopt_pp.training.loop.train`, over the real stream.

    All processes of `world` must call this together; those beyond `num_stages` return None.

    Returns:
        `received`, the times at which each microbatch's forward began; `ended`, that of the end of the last step; and
        `seconds`, what the steps spent in each phase in all, by the names of `docs/metrics.md`.
    """
    ends = boundaries(world, Topology(num_stages, num_stages), timeout=120)
    if world.rank >= num_stages:
        return None
    stage: Any = _Stage(world.rank, load)
    receivers, senders = {}, {}
    if stage.index - 1 in ends:
        receivers[stage.index] = StreamReceiver(ends[stage.index - 1], _headers(load, steps), queue_depth)
    if stage.index in ends:
        senders[stage.index] = StreamSender(ends[stage.index], _headers(load, steps), queue_depth)
    records: list[dict[str, float]] = []
    ended = 0.0

    def report(record: dict[str, float]) -> None:
        nonlocal ended
        ended = time.perf_counter()
        records.append(record)

    sampler: Any = _Sampler(load.microbatches)
    train(Segment([stage], receivers, senders), StepPlan(sampler, [LocalTraining(sampler)]), range(steps), report)
    seconds = {name: sum(r[name] for r in records) for name in records[0] if name.endswith("_seconds")}
    return {"received": stage.received, "ended": ended, "seconds": seconds}


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, load: Load) -> torch.Tensor:
        ctx.seconds = load.backward
        ctx.save_for_backward(weight)
        time.sleep(load.forward)
        return hidden_states.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, torch.zeros_like(*ctx.saved_tensors), None


class _SleepingModule(torch.nn.Module):
    def __init__(self, load: Load) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._load = load

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return _Sleep.apply(hidden_states, self.weight, self._load)


def peer_name(num_stages: int, microbatches: int) -> str:
    """The schedule that `run_peer` runs.

    PyTorch's 1F1B refuses fewer microbatches than stages. GPipe is used there instead: with so few, both make the same
    bubble, `num_stages - 1` forwards and backwards per step.
    """
    return "1F1B" if microbatches >= num_stages else "GPipe"


def run_peer(world: World, num_stages: int, load: Load, steps: int) -> Times | None:
    """Trains the same stages end to end under PyTorch's schedule, gradients travelling back.

    All processes of `world` must call this together; those beyond `num_stages` return None.

    Returns:
        `ended`, the times at which each step ended. The first of the steps sets up connections and exchanges shapes.
    """
    group = dist.new_group(range(num_stages), backend="gloo")
    if world.rank >= num_stages:
        return None
    # That gradients travel back is known from `requires_grad` of these.
    given = torch.zeros(load.shape, requires_grad=world.rank > 0)
    made = torch.zeros(load.shape, requires_grad=True)
    module = _SleepingModule(load)
    stage = PipelineStage(module, world.rank, num_stages, world.device, input_args=given, output_args=made, group=group)
    schedule = {"1F1B": Schedule1F1B, "GPipe": ScheduleGPipe}[peer_name(num_stages, load.microbatches)]
    runner = schedule(stage, load.microbatches, loss_fn=lambda output, target: output.sum())
    rows, *others = load.shape
    whole = torch.zeros(load.microbatches * rows, *others)
    inputs = (whole,) if world.rank == 0 else ()
    target = whole if world.rank == num_stages - 1 else None
    ended = []
    for _ in range(steps):
        runner.step(*inputs, target=target, return_outputs=False)
        time.sleep(load.optimizer)
        ended.append(time.perf_counter())
    return {"ended": ended}


Run = Callable[..., Times | None]
RUNS: Mapping[str, Run] = {"ours": run_ours, "peer": run_peer}

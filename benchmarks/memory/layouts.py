"""Ways to lay a model over processes and train it, each measured for the memory that its processes hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.helpers.process_memory import MemoryTracker, SavedTensors, give_back_at_once
from benchmarks.helpers.synthetic import FORMATS, MANY_STEPS, OPTIM, model_config, random_rows
from lopt_pp.config.compute import StageConfig
from lopt_pp.config.topology import Topology
from lopt_pp.data import MicrobatchSampler
from lopt_pp.distributed.world import World
from lopt_pp.metrics.records import Record
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.structure import ModelStructure
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.pipeline.boundary import boundaries
from lopt_pp.pipeline.stream import LocalStream, Receiver, Sender, StreamReceiver, StreamSender
from lopt_pp.stage.compute import prepare_block
from lopt_pp.stage.end_to_end import EndToEndPipeline, clip_grad_norm
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.stage import Stage
from lopt_pp.training.loop import train
from lopt_pp.training.phases import LocalTraining
from lopt_pp.training.segment import Segment
from lopt_pp.training.step_plan import StepPlan

_TIMEOUT = 600.0


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        model: its name in `helpers.synthetic.FORMATS`.
        method: this project's (end to end with one stage), or a schedule of `torch.distributed.pipelining`.
        stages: that the model is cut into, evenly.
        processes: that hold them, in order; with a schedule of PyTorch's as many as stages.
        microbatches: of an optimizer step.
        queue_depth: of the streams between processes.
        dtype: of the computation, as the flag has it.
        gradient_checkpointing: likewise.
    """

    model: str
    method: Literal["LoPT-PP", "1F1B", "GPipe"]
    stages: int
    processes: int
    microbatches: int
    queue_depth: int = 2
    dtype: Literal["float32", "bfloat16", "pure_bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    @property
    def has_queues(self) -> bool:
        return self.method == "LoPT-PP" and self.processes > 1

    @property
    def is_plain(self) -> bool:
        return self.dtype == "float32" and not self.gradient_checkpointing

    @property
    def steps(self) -> int:
        """What it takes to fill the queues, whose buffers are resident once they have been written to."""
        messages = self.queue_depth + 1 if self.has_queues else 1
        return -(-messages // self.microbatches)

    @property
    def layout(self) -> str:
        """What it is called in tables."""
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        stages = f" {self.stages} in" if self.processes < self.stages else ""
        return f"{'end to end' if self.stages == 1 else self.method},{stages} {processes}"

    @property
    def stage_config(self) -> StageConfig:
        return StageConfig(dtype=self.dtype, gradient_checkpointing=self.gradient_checkpointing)


@dataclass(frozen=True)
class ProcessMemory:
    """What one process holds, in bytes.

    Attributes:
        imports: with nothing but the program; 0 on a GPU.
        weights: of its blocks and local heads.
        gradients: of all of them.
        optimizer: AdamW's state.
        fixed: with all of these, between two steps.
        activations: the most that is added to that by the one microbatch at work, or by the several that a schedule
            has at work at once.
        queue: the messages that wait at its boundaries when these are full, besides the one at work: `queue_depth`
            where it receives; one less where it sends, since the newest is the stage's own output.
        saved: the most that autograd keeps for backward, parameters aside; None with gradient checkpointing.
        peak: the most that training takes.
    """

    imports: int
    weights: int
    gradients: int
    optimizer: int
    fixed: int
    activations: int
    queue: int
    saved: int | None
    peak: int

    @property
    def model(self) -> int:
        """What the model itself takes, wherever it is trained by AdamW."""
        return self.weights + self.gradients + self.optimizer

    @property
    def other(self) -> int:
        """What is there besides the imports and the model between two steps: libraries' pages, communication."""
        return self.fixed - self.imports - self.model

    @property
    def at_work(self) -> int:
        """The activations without the queue."""
        return self.activations - self.queue


class Trainee(Protocol):
    """What one process trains.

    Attributes:
        optimizers: of its blocks.
        queued: number of messages that wait at its boundaries when these are full.
    """

    optimizers: list[Optimizer]
    queued: int

    def join(self) -> None:
        """Prepares the communication of one `run`, together with the other processes."""

    def run(self, sampler: MicrobatchSampler, after_step: Callable[[], None]) -> None:
        """Trains for an epoch of `order`."""


class _LocalLearning:
    """The real stages, streams and loop of this project."""

    def __init__(self, world: World, case: Case, structure: ModelStructure) -> None:
        self._world, self._case = world, case
        self._topology = Topology(case.stages, case.processes)
        own = self._topology.stages_of(world.rank if case.processes > 1 else 0)
        self._stages = [self._stage(structure, number) for number in own]
        self.optimizers = [stage.optimizer for stage in self._stages if stage.optimizer is not None]
        self.queued = 0
        if case.has_queues:
            receives, sends = own[0] > 0, own[-1] < case.stages - 1
            self.queued = case.queue_depth * receives + (case.queue_depth - 1) * sends

    def _stage(self, structure: ModelStructure, number: int) -> Stage:
        config = model_config(self._case.model)
        spec = split_evenly(config.num_hidden_layers, self._case.stages)[number]
        block = BlockBuilder(LlamaForCausalLM, config, structure).with_random_weights(spec)
        objective = local_objective(block, ObjectiveConfig(), seed=0)
        return Stage(block, objective, OPTIM, MANY_STEPS, config=self._case.stage_config, device=self._world.device)

    def join(self) -> None:
        self._ends = boundaries(self._world, self._topology, _TIMEOUT) if self._case.has_queues else {}

    def run(self, sampler: MicrobatchSampler, after_step: Callable[[], None]) -> None:
        num_steps, depth = sampler.steps_per_epoch, self._case.queue_depth
        plan = StepPlan(sampler, [LocalTraining(sampler)])
        receivers: dict[int, Receiver] = {}
        senders: dict[int, Sender] = {}
        for before, after in pairwise(self._stages):
            senders[before.index] = receivers[after.index] = LocalStream()
        first, last = self._stages[0], self._stages[-1]
        if first.index - 1 in self._ends:
            headers = plan.headers(range(num_steps), first, first.index - 1)
            receivers[first.index] = StreamReceiver(self._ends[first.index - 1], headers, depth)
        if last.index in self._ends:
            headers = plan.headers(range(num_steps), last, last.index)
            senders[last.index] = StreamSender(self._ends[last.index], headers, depth)

        def report(record: Record) -> None:
            if record["stage"] == last.index:
                after_step()

        train(Segment(self._stages, receivers, senders), plan, range(num_steps), report)


class _Schedule:
    """A schedule of `torch.distributed.pipelining`, one block in each process."""

    queued = 0

    def __init__(self, world: World, case: Case, structure: ModelStructure) -> None:
        config = model_config(case.model)
        spec = split_evenly(config.num_hidden_layers, case.stages)[world.rank]
        block = BlockBuilder(LlamaForCausalLM, config, structure).with_random_weights(spec)
        # Before the optimizer takes its parameters.
        prepare_block(block, case.stage_config, world.device)
        self._group = dist.new_group(backend=world.payload_backend)
        self._block, self._device, self._case = block, world.device, case
        self._optimizer = Optimizer(block.parameters(), OPTIM, OPTIM.learning_rate, MANY_STEPS)
        self.optimizers = [self._optimizer]

    def join(self) -> None:
        # Without what an earlier run has left: the schedule's buffers.
        config, schedule = self._case.stage_config, self._case.method
        self._pipeline = EndToEndPipeline(
            [self._block], self._group, self._device, config=config, objective=ObjectiveConfig(), schedule=schedule
        )
        dist.barrier(self._group)

    def run(self, sampler: MicrobatchSampler, after_step: Callable[[], None]) -> None:
        for step in range(sampler.steps_per_epoch):
            self._pipeline.step(sampler.microbatches(step), sampler.counts(step).num_targets)
            clip_grad_norm(self._optimizer.parameters, OPTIM.max_grad_norm, self._group)
            self._optimizer.step()
            after_step()


def measure(world: World, case: Case, structure: ModelStructure) -> ProcessMemory:
    """Trains and measures this process's part of a case; all its processes do it together.

    In the steps that are measured each microbatch finds gradients to add to, as all but the first of a step do. That
    one's gradients come as its activations go, and the two could not be told apart. So where a step has no other
    microbatch the peak is not of these steps but of the warm-up, which begins without gradients.
    """
    transformers_logging.disable_progress_bar()
    if world.device.type == "cpu":
        give_back_at_once()
    tracker, shape, hidden_size = MemoryTracker(world.device), FORMATS[case.model], model_config(case.model).hidden_size
    imports = tracker.current()
    trainee: Trainee = (_LocalLearning if case.method == "LoPT-PP" else _Schedule)(world, case, structure)
    parameters = [parameter for optimizer in trainee.optimizers for parameter in optimizer.parameters]

    # AdamW makes its state in its first step, which moves nothing where gradients are zero.
    _fill_gradients(parameters)
    for optimizer in trainee.optimizers:
        optimizer.step()
    trainee.join()
    tracker.reset_peak()
    trainee.run(
        _sampler(replace(case, microbatches=1), steps=case.steps if case.microbatches == 1 else 1), lambda: None
    )
    peak = tracker.peak()

    trainee.join()
    _fill_gradients(parameters)
    fixed = tracker.current()
    tracker.reset_peak()
    with SavedTensors(parameters) as saved:
        trainee.run(_sampler(case, case.steps), lambda: _fill_gradients(parameters))
    activations = tracker.peak() - fixed

    states = [state for optimizer in trainee.optimizers for state in optimizer.inner.state.values()]
    weights = sum(parameter.nbytes for parameter in parameters)
    message = shape.rows * shape.tokens * hidden_size * case.stage_config.compute_dtype.itemsize
    return ProcessMemory(
        imports=imports,
        weights=weights,
        gradients=weights,
        optimizer=sum(tensor.nbytes for state in states for tensor in state.values()),
        fixed=fixed,
        activations=activations,
        queue=trainee.queued * message,
        saved=None if case.gradient_checkpointing else saved.peak,
        peak=peak if case.microbatches == 1 else fixed + activations,
    )


def _sampler(case: Case, steps: int) -> MicrobatchSampler:
    shape = FORMATS[case.model]
    rows = shape.rows * case.microbatches * steps
    return MicrobatchSampler(
        random_rows(model_config(case.model).vocab_size, shape.tokens, rows),
        per_device_train_batch_size=shape.rows,
        gradient_accumulation_steps=case.microbatches,
        shuffle=True,
        seed=0,
        pad_token_id=0,
    )


def _fill_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

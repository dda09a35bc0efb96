"""Joins the stages of this process to their neighbours, and finds out from whom it hears that the run is to stop."""

import logging
from collections.abc import Sequence
from typing import Any

from lopt_pp.distributed.shutdown import NEVER_STOPS, RunLength, StopSignal
from lopt_pp.distributed.world import World
from lopt_pp.pipeline.boundary import boundaries
from lopt_pp.pipeline.stream import LocalStream, Receiver, Sender, StreamReceiver, StreamSender
from lopt_pp.stage.base import BaseStage
from lopt_pp.stage.stage import Stage
from lopt_pp.training.segment import Segment
from lopt_pp.training.setup import Setup
from lopt_pp.training.step_plan import StepPlan

logger = logging.getLogger(__name__)

_NCCL_DEPTH = 2
"""Messages that may be on their way over NCCL, at least. There a message leaves only when its receive runs on the other
GPU: with one, the sender would wait in every microbatch until the receiver is done with the one before."""


def deciders(setup: Setup, world: World) -> list[int]:
    """The ranks that decide when the run stops: those of the first stage, or all where it is trained end to end."""
    if setup.is_end_to_end:
        return list(range(world.size))
    return [setup.topology.rank_of(0, replica) for replica in range(setup.topology.num_replicas)]


def connect(
    setup: Setup,
    world: World,
    stages: Sequence[BaseStage],
    plan: StepPlan[Any],
    steps: range,
    decided: StopSignal | None,
    length: RunLength,
) -> Segment[Any]:
    """Opens the streams at the boundaries of this process. All processes must call this.

    Args:
        setup: of the run.
        world: this process.
        stages: of this process, in order.
        plan: of each step.
        steps: of the run, that are to be made unless it is stopped.
        decided: says which steps are made, where this process is one of those that decide; None elsewhere.
        length: of the run; where nothing is decided here, the stream says whether it finishes early.

    Returns:
        The stages with their ends of the streams; which steps this process makes is said by `decided`, or else by the
        stream from the process before.
    """
    if setup.is_end_to_end:  # PyTorch's schedule sends and receives by itself.
        assert decided is not None
        return Segment(stages, stop_signal=decided)
    topology = setup.topology
    ends = boundaries(world, topology, setup.config.pipeline.stream_timeout)
    depth, stop_signal = _queue_depth(setup, world), decided or NEVER_STOPS
    receivers: dict[int, Receiver] = {}
    senders: dict[int, Sender] = {}
    for stage in stages:
        assert isinstance(stage, Stage)
        if stage.index - 1 in ends:
            headers = plan.headers(steps, stage, boundary=stage.index - 1)
            receiver = StreamReceiver(ends[stage.index - 1], headers, depth, length)
            stop_signal = receivers[stage.index] = receiver
        if stage.index in ends:
            headers = plan.headers(steps, stage, boundary=stage.index)
            senders[stage.index] = StreamSender(ends[stage.index], headers, depth, stop_signal, length)
        elif stage.index + 1 in topology.stages_of(world.rank):
            senders[stage.index] = receivers[stage.index + 1] = LocalStream()
    return Segment(stages, receivers, senders, stop_signal)


def _queue_depth(setup: Setup, world: World) -> int:
    """Messages that may be on their way at once; the same at both ends, which have the same flags and backend."""
    given = setup.config.pipeline.queue_depth
    if world.payload_backend != "nccl" or world.size == 1 or given >= _NCCL_DEPTH:
        return given
    if world.rank == 0:
        logger.info("--queue_depth %d is raised to %d: NCCL sends nothing ahead with less", given, _NCCL_DEPTH)
    return _NCCL_DEPTH

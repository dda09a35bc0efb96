"""What each stage of a large run needs, and how long its steps take: what benchmarks/scaling/__main__.py prints."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.scaling import arithmetic
from benchmarks.scaling.arithmetic import Memory
from benchmarks.scaling.model_sizes import Load, Model
from lopt_pp.model.partition import BlockSpec


@dataclass(frozen=True)
class Gpu:
    """The hardware.

    Attributes:
        flops: operations per second that a stage reaches.
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        link: bytes per second each way that a boundary has for one replica's stream.
        replica_link: bytes per second each way that a GPU has to the replicas of its stage.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    replica_link: float


@dataclass(frozen=True)
class StageNeeds:
    """One stage of a run: sizes in bytes, times in seconds."""

    stage: int
    layers: str
    parameters: int
    local_head_parameters: int
    memory: Memory
    total_bytes: int
    fits: bool
    operations: int
    microbatch_seconds: float
    optimizer_seconds: float
    replica_bytes_per_microbatch: float
    replica_bytes_per_step: float
    pace_seconds: float
    """Of a microbatch, with the traffic between replicas that comes with each and overlaps it."""
    step_end_seconds: float
    """What a step takes besides: the optimizer, and of DDP's traffic what the last backward does not hide."""


def needs_of(model: Model, load: Load, specs: Sequence[BlockSpec], gpu: Gpu, depth: int = 2) -> list[StageNeeds]:
    """What each stage needs."""
    needs = []
    for spec in specs:
        size, memory = model.size(spec), arithmetic.memory(model, load, spec, depth)
        own = size.total / (load.data_parallel if load.sharding == "full" else 1)
        operations = arithmetic.operations(model, load, spec)
        seconds = operations / gpu.flops
        optimizer = arithmetic.optimizer_seconds(own, load, gpu.bandwidth)
        by_microbatch, by_step = arithmetic.replica_traffic(size.total, load)
        needs.append(
            StageNeeds(
                stage=spec.stage,
                layers=str(spec).removeprefix("layers "),
                parameters=size.total,
                local_head_parameters=size.local_head,
                memory=memory,
                total_bytes=memory.total,
                fits=memory.total <= gpu.memory,
                operations=operations,
                microbatch_seconds=seconds,
                optimizer_seconds=optimizer,
                replica_bytes_per_microbatch=by_microbatch,
                replica_bytes_per_step=by_step,
                pace_seconds=max(seconds, by_microbatch / gpu.replica_link),
                # Backward is two thirds of a microbatch, or more with checkpointing.
                step_end_seconds=optimizer + max(0.0, by_step / gpu.replica_link - seconds * 2 / 3),
            )
        )
    return needs


def forecast(
    name: str, model: Model, load: Load, num_stages: int, split: str, gpu: Gpu, delays: Sequence[float]
) -> dict[str, Any]:
    """Everything about one run, as plain data. Keys end in their unit; without one they are numbers of something.

    Args:
        name: of the model.
        model: the model.
        load: microbatches, dtype, replicas.
        num_stages: of a pipeline.
        split: midpoint, auto or first layers.
        gpu: the hardware.
        delays: one way, in seconds.
    """
    specs = arithmetic.spans_of(model, load, num_stages, split)
    needs = needs_of(model, load, specs, gpu)
    accumulation, message = load.accumulation, arithmetic.message_bytes(model, load) if num_stages > 1 else 0
    busiest = max(need.microbatch_seconds for need in needs)
    pace = max(need.pace_seconds for need in needs)
    transfer = message / gpu.link
    step = max(accumulation * max(need.pace_seconds, transfer) + need.step_end_seconds for need in needs)
    peer_step = (accumulation + num_stages - 1) * max(pace, transfer) + max(need.step_end_seconds for need in needs)
    balanced = arithmetic.balanced(model, load, num_stages)

    return {
        "model": name,
        "num_stages": num_stages,
        "data_parallel": load.data_parallel,
        "gpus": num_stages * load.data_parallel,
        "load": asdict(load),
        "split": split,
        "stages": [asdict(need) for need in needs],
        "parameters": sum(need.parameters for need in needs),
        "microbatch_seconds": busiest,
        "pace_seconds": pace,
        "balance": sum(need.microbatch_seconds for need in needs) / num_stages / busiest,
        "step_seconds": step,
        "tokens_per_second": load.data_parallel * accumulation * load.microbatch / step,
        "auto_split": {
            "first_layers": [spec.start for spec in balanced[1:]],
            "microbatch_seconds": max(arithmetic.operations(model, load, spec) for spec in balanced) / gpu.flops,
        },
        "boundary": {
            "bytes_per_microbatch": message,
            "bytes_per_second": message / pace,
            "bytes_per_second_of_all_replicas": load.data_parallel * message / pace,
            "transfer_seconds": transfer,
            "link_carries_it": transfer <= pace,
        },
        "delays": [
            {
                "delay_seconds": delay,
                "queue_depth": (depth := arithmetic.queue_depth(delay, max(pace, transfer))),
                "queue_bytes_at_each_end": depth * message,
                "in_flight_bytes": 2 * delay * message / pace,
                "step_seconds": step,
                "step_seconds_1f1b": peer_step + arithmetic.delay_1f1b(num_stages, accumulation, delay),
                "step_seconds_1f1b_one_slow_boundary": peer_step
                + arithmetic.delay_1f1b_at_one(num_stages, accumulation, delay),
            }
            for delay in delays
        ],
        "one_f_one_b": {
            "bubble": arithmetic.bubble_1f1b(num_stages, accumulation),
            "kept_bytes_on_first_stage": arithmetic.kept_1f1b(model, load, specs),
            "kept_bytes_on_first_stage_of_ours": needs[0].memory.kept,
            "bytes_per_microbatch_each_way": message,
        },
    }

"""Finds the cuts that give every stage the same work: `--split auto`."""

import logging
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.config import Config
from lopt_pp.costs import Costs, measure
from lopt_pp.data import DataOrder
from lopt_pp.span import Span, split_at
from lopt_pp.split import Anatomy
from lopt_pp.topology import Topology

logger = logging.getLogger(__name__)

_STEPS = 20
"""Of the run, whose microbatches say how long a usual one is."""


def balance(costs: Costs, stages_per_process: Sequence[int]) -> tuple[Span, ...]:
    """The cuts that keep the busiest process, and then the busiest stage of each process, as short as they can be.

    Args:
        costs: of the model's parts.
        stages_per_process: how many stages each process holds, in order.
    """
    depth, num_stages = len(costs.layers), sum(stages_per_process)
    stages_after = [sum(stages_per_process[position:]) for position in range(len(stages_per_process))]

    def process_cost(position: int, start: int, stop: int) -> float:
        is_last = position == len(stages_per_process) - 1
        return costs.of(start, stop, stages_per_process[position] - is_last)

    outer = _cut(0, depth, stages_per_process, process_cost)
    cuts: list[int] = []
    for position, (start, stop) in enumerate(pairwise([0, *outer, depth])):
        first = num_stages - stages_after[position]

        def stage_cost(stage: int, start: int, stop: int, first: int = first) -> float:
            return costs.of(start, stop, int(first + stage < num_stages - 1))

        cuts += [*_cut(start, stop, [1] * stages_per_process[position], stage_cost), stop]
    return split_at(cuts[:-1], depth)


def _cut(start: int, stop: int, sizes: Sequence[int], cost: Callable[[int, int, int], float]) -> list[int]:
    """Cuts `start` to `stop` into parts of at least `sizes` layers so that the dearest part is as cheap as it can be.

    Returns:
        The first layer of each part after the first.
    """
    # By the end of the parts so far: the cost of the dearest of them, and their cuts.
    best: dict[int, tuple[float, list[int]]] = {start: (0.0, [])}
    for part, size in enumerate(sizes):
        still_needed = sum(sizes[part + 1 :])
        ends = [stop] if part == len(sizes) - 1 else range(start, stop - still_needed + 1)
        best = {
            end: min(
                (max(dearest, cost(part, begin, end)), [*cuts, begin])
                for begin, (dearest, cuts) in best.items()
                if begin + size <= end
            )
            for end in ends
            if any(begin + size <= end for begin in best)
        }
    return best[stop][1][1:]


def find_cuts(
    config: Config,
    topology: Topology,
    model_class: type[PreTrainedModel],
    model_config: PreTrainedConfig,
    anatomy: Anatomy,
    order: DataOrder,
    device: torch.device,
) -> list[int]:
    """Times the model's parts on microbatches as the data has them, logs what it found, and balances the stages.

    Args:
        config: the flags.
        topology: of the run.
        model_class: the whole model's class.
        model_config: the whole model's config.
        anatomy: of the class.
        order: of the data.
        device: to measure on.

    Returns:
        The first layer of each stage after the first.
    """
    rows, tokens = zip(*(shape for step in range(_STEPS) for shape in order.shapes(step)), strict=True)
    shape = max(rows), round(statistics.median(tokens))
    costs = measure(
        model_class,
        model_config,
        anatomy,
        shape,
        config.run.gradient_accumulation_steps,
        config.objective,
        config.optim,
        config.stage,
        device,
    )
    spans = balance(costs, [len(topology.stages_of(rank)) for rank in topology.ranks_of_replica(0)])
    busy = (costs.of(span.start, span.stop, num_local_heads=0 if span.is_last else 1) for span in spans)
    logger.info("--split auto: of a microbatch of %d x %d tokens, %s", *shape, costs)
    logger.info("--split auto: stages of %s ms", ", ".join(f"{1e3 * seconds:.1f}" for seconds in busy))
    return [span.start for span in spans[1:]]

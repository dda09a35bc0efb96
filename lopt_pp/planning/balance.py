"""Finds the cuts that give every stage the same work: `--split auto`."""

import logging
from collections.abc import Callable, Sequence
from itertools import pairwise

from lopt_pp.model.partition import BlockSpec, split_at
from lopt_pp.planning.costs import Costs

logger = logging.getLogger(__name__)


def balance(costs: Costs, stages_per_process: Sequence[int]) -> tuple[BlockSpec, ...]:
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

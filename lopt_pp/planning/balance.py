"""Finds the cuts that give every stage the same work: `--split auto`."""

from collections.abc import Sequence
from itertools import pairwise

from lopt_pp.model.partition import BlockSpec, split_at
from lopt_pp.planning.costs import Costs
from lopt_pp.util.linear_partition import linear_partition


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

    outer, _ = linear_partition(0, depth, stages_per_process, process_cost)
    cuts: list[int] = []
    for position, (start, stop) in enumerate(pairwise([0, *outer, depth])):
        first = num_stages - stages_after[position]

        def stage_cost(stage: int, start: int, stop: int, first: int = first) -> float:
            return costs.of(start, stop, int(first + stage < num_stages - 1))

        inner, _ = linear_partition(start, stop, [1] * stages_per_process[position], stage_cost)
        cuts += [*inner, stop]
    return split_at(cuts[:-1], depth)

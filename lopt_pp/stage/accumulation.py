"""How gradients add up over the microbatches of a step: which a stage learns from, and when its replicas share them."""

import contextlib
from collections.abc import Iterable

from torch.nn.parallel import DistributedDataParallel


def learned_microbatches(step: int, num_microbatches: int, accumulation_steps: int | None) -> list[int]:
    """The microbatches of a step that a stage learns from, by their place in its replica's part of it; ascending.

    Where these are not all of them, they move on from step to step, so that each place is learned from equally often:
    the longest sequences may come first in a step. With `--gradient_accumulation_steps 4` and
    `--local_accumulation_steps 2`, steps 0, 1, 2, 3, ... learn from the microbatches 0 and 1, 2 and 3, 0 and 1, 2 and
    3, ...; the other two of each step only go forward.

    Args:
        step: of the run.
        num_microbatches: in the replica's part of it.
        accumulation_steps: number of them that the stage learns from, at most; None is all.
    """
    number = num_microbatches if accumulation_steps is None else min(accumulation_steps, num_microbatches)
    return sorted((step * number + place) % num_microbatches for place in range(number))


def without_sync(replicas: Iterable[DistributedDataParallel]) -> contextlib.ExitStack:
    """For forward and backward of one microbatch: before the last of a step, replicas need not hear of each other.

    Sharded replicas add up their gradients in each microbatch, since none has room for all of them.
    """
    waiting = contextlib.ExitStack()
    for replica in replicas:
        waiting.enter_context(replica.no_sync())
    return waiting

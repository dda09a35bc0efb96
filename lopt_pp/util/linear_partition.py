"""Cuts a sequence into parts of which the dearest is as cheap as it can be."""

from collections.abc import Callable, Sequence


def linear_partition(
    start: int, stop: int, sizes: Sequence[int], cost: Callable[[int, int, int], float]
) -> tuple[list[int], float]:
    """Cuts the items `start` to `stop - 1` into consecutive parts so that the dearest part is as cheap as it can be.

    This is the linear partition problem, solved by dynamic programming over the parts (Skiena, The Algorithm Design
    Manual, section on partition problems), with a cost that may also depend on which part it is. For example, layers
    that cost 3, 1, 1 and 3 are cut into two parts after the second: each part costs 4.

    Args:
        start: number of the first item.
        stop: number of the last item plus 1.
        sizes: the fewest items that each part may have.
        cost: of a part, by the number of the part, that of its first item and that of its last item plus 1.

    Returns:
        The first item of each part after the first, and the cost of the dearest part. Where several cuts are equally
        good, always the same one of them.

    Raises:
        ValueError: there are fewer items than `sizes` sums up to, or no part.
    """
    if not sizes or stop - start < sum(sizes):
        raise ValueError(f"{stop - start} items cannot be cut into parts of at least {list(sizes)} items")
    # By the end of the parts so far: the first item of each of them, after the cost of the dearest.
    best: dict[int, tuple[float, list[int]]] = {start: (0.0, [])}
    for part, size in enumerate(sizes):
        # Enough items are left for the parts that follow; the last part takes all that are left.
        ends = [stop] if part == len(sizes) - 1 else range(start, stop - sum(sizes[part + 1 :]) + 1)
        best = {
            end: min(
                (max(dearest, cost(part, begin, end)), [*firsts, begin])
                for begin, (dearest, firsts) in best.items()
                if begin + size <= end
            )
            for end in ends
            if any(begin + size <= end for begin in best)
        }
    dearest, firsts = best[stop]
    return firsts[1:], dearest

"""Parts of which the dearest is as cheap as it can be."""

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest

from lopt_pp.util.linear_partition import linear_partition


def all_cuts(start: int, stop: int, sizes: Sequence[int]) -> Iterator[list[int]]:
    """Every way to cut into parts of at least these sizes."""
    for cuts in combinations(range(start, stop + 1), len(sizes) - 1):
        edges = pairwise([start, *cuts, stop])
        if all(end - begin >= size for (begin, end), size in zip(edges, sizes, strict=True)):
            yield list(cuts)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_cuts_have_a_cheaper_dearest_part(seed: int) -> None:
    """Against all cuts that there are; here a part's cost depends on which part it is and where it ends."""
    draw = random.Random(seed)
    start, sizes = draw.randint(0, 3), [draw.randint(1, 2) for _ in range(draw.randint(1, 4))]
    stop = start + sum(sizes) + draw.randint(0, 4)
    items = [draw.randint(1, 4) for _ in range(stop)]
    factors, head = [draw.choice((1.0, 0.5)) for _ in sizes], draw.randint(0, 5)

    def cost(part: int, begin: int, end: int) -> float:
        return factors[part] * sum(items[begin:end]) + (head if end == stop else 0)

    def dearest(cuts: list[int]) -> float:
        return max(cost(part, *ends) for part, ends in enumerate(pairwise([start, *cuts, stop])))

    possible = list(all_cuts(start, stop, sizes))
    cuts, found = linear_partition(start, stop, sizes, cost)
    assert cuts in possible
    assert found == dearest(cuts) == min(map(dearest, possible))


def test_the_example() -> None:
    items = [3, 1, 1, 3]
    assert linear_partition(0, 4, [1, 1], lambda _, start, stop: sum(items[start:stop])) == ([2], 4)


@pytest.mark.parametrize(("stop", "sizes"), [(3, [2, 2]), (1, [1, 1]), (3, [])])
def test_too_few_items_are_refused(stop: int, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot be cut into parts"):
        linear_partition(0, stop, sizes, lambda *_: 1.0)

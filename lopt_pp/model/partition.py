"""Where a model is cut: the layers that each of its blocks has."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class BlockSpec:
    """The place of one block: stage `stage` of `num_stages` holds the layers `start` to `stop - 1`.

    Attributes:
        chosen: of these layers, the ones that it has, in order; None for all of them.
    """

    stage: int
    num_stages: int
    start: int
    stop: int
    chosen: tuple[int, ...] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of its layers in the whole model."""
        return tuple(range(self.start, self.stop)) if self.chosen is None else self.chosen

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def sample_after(self, depth: int, number: int) -> "BlockSpec":
        """The rest of the model after this block, with fewer layers: the last of each of `number` equal stretches.

        Args:
            depth: layers of the model.
            number: of layers; where fewer follow, it has all of them.
        """
        following = depth - self.stop
        number = min(number, following)
        chosen = tuple(self.stop - 1 + -(-following * turn // number) for turn in range(1, number + 1))
        return self._after(depth, chosen)

    def choose_after(self, depth: int, numbers: Sequence[int]) -> "BlockSpec":
        """The rest of the model after this block, with those of these layers that follow it.

        Args:
            depth: layers of the model.
            numbers: of layers, ascending.

        Raises:
            LoptError: none of them follows, or the model has not as many layers.
        """
        chosen = tuple(number for number in numbers if number >= self.stop)
        if not chosen or chosen[-1] >= depth:
            raise LoptError(
                f"the layers {','.join(map(str, numbers))} are not those of an auxiliary network after {self}: at "
                f"least one of the layers {self.stop} to {depth - 1}, and none above"
            )
        return self._after(depth, chosen)

    def _after(self, depth: int, chosen: tuple[int, ...]) -> "BlockSpec":
        return BlockSpec(self.num_stages - 1, self.num_stages, self.stop, depth, chosen)

    def __str__(self) -> str:
        if self.chosen is not None:
            return f"layers {', '.join(map(str, self.chosen))}"
        return f"layers {self.start}-{self.stop - 1}"


def split_evenly(num_layers: int, num_stages: int) -> tuple[BlockSpec, ...]:
    """Cuts `num_layers` into `num_stages` blocks of (nearly) equal length: two at the midpoint, as in the paper.

    Raises:
        LoptError: there are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise LoptError(
            f"--num_stages {num_stages} is more than the model's {num_layers} layers; give at most {num_layers}"
        )
    return split_at([stage * num_layers // num_stages for stage in range(1, num_stages)], num_layers)


def split_at(boundaries: Iterable[int], num_layers: int) -> tuple[BlockSpec, ...]:
    """Cuts before each layer named in `boundaries`.

    Raises:
        LoptError: they do not ascend, or lie outside of 1 to `num_layers - 1`.
    """
    edges = [0, *boundaries, num_layers]
    if any(stop <= start for start, stop in itertools.pairwise(edges)):
        raise LoptError(
            f"--split {','.join(map(str, edges[1:-1]))}: layer numbers that ascend, from 1 to {num_layers - 1}; the "
            f"model has {num_layers} layers"
        )
    return tuple(
        BlockSpec(stage, len(edges) - 1, start, stop) for stage, (start, stop) in enumerate(itertools.pairwise(edges))
    )

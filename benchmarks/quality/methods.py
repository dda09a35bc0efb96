"""What is compared: ways to train the same model on the same rows, each over the same learning rates."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: in the tables.
        flags: of the program.
        is_local: whether the earlier blocks learn from a loss of their own, at a rate of their own.
    """

    name: str
    flags: Sequence[str]
    is_local: bool = False


Setting = tuple[str, float, float | None]
"""Method, learning rate, and the earlier blocks' share of it."""

METHODS = {
    method.name: method
    for method in (
        Method("e2e", ("--method", "e2e")),
        Method("frozen", ("--method", "frozen")),
        Method("reconstruction", ("--local_objective", "reconstruction"), is_local=True),
        Method("next_token", ("--local_objective", "next_token"), is_local=True),
    )
}
UNTOUCHED = "untouched"
"""The model as it is, beside them."""


@dataclass(frozen=True)
class Trial:
    """One training run: what it differs by from the others.

    Attributes:
        method: of `METHODS`.
        learning_rate: of the last block; of the whole model end to end.
        local_share: of it that the earlier blocks learn at.
        seed: of the order of the rows and of new weights.
        steps: of the optimizer.
    """

    method: str
    learning_rate: float
    local_share: float | None
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its files."""
        share = "" if self.local_share is None else f"-share{self.local_share:g}"
        return f"{self.method}-rate{self.learning_rate:g}{share}-seed{self.seed}-steps{self.steps}"

    @property
    def setting(self) -> Setting:
        """What is chosen by the validation rows."""
        return self.method, self.learning_rate, self.local_share

    def flags(self, head_rate: float, head_warmup: float) -> list[str]:
        """Of the program.

        Args:
            head_rate: of the local heads, as a multiple of the last block's.
            head_warmup: share of the steps in which the local heads learn alone.
        """
        flags = [*METHODS[self.method].flags, "--learning_rate", f"{self.learning_rate:g}"]
        if self.local_share is not None:
            rate = self.local_share * self.learning_rate
            flags += ["--local_learning_rate", f"{rate:g}"]
            flags += ["--local_head_learning_rate", f"{head_rate * self.learning_rate:g}"]
            flags += ["--local_head_warmup_steps", str(round(head_warmup * self.steps))]
        return [*flags, "--seed", str(self.seed), "--max_steps", str(self.steps)]


def grid(
    methods: Sequence[str], rates: Sequence[float], local_shares: Sequence[float], seed: int, steps: int
) -> list[Trial]:
    """The trials that the learning rates of each method are chosen from."""
    return [
        Trial(method, rate, share, seed, steps)
        for method in methods
        for rate in rates
        for share in (local_shares if METHODS[method].is_local else (None,))
    ]

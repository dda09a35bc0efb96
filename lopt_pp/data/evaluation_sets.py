"""The held-out rows of a run: one set without a name, or several, each with a name."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from lopt_pp.data.dataset import TokenizedRows


@dataclass(frozen=True)
class EvaluationSets:
    """Sets of rows that are not trained on, each measured by itself.

    Attributes:
        rows: of each set, by its name; the name of the only one may be empty.
    """

    rows: Mapping[str, TokenizedRows]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.rows)

    @property
    def digest(self) -> str:
        """In hex: sets with other rows, other tokens of them or other names have another one."""
        if self.names == ("",):
            return self.rows[""].digest
        digests = [[name, rows.digest] for name, rows in self.rows.items()]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def summary(self) -> str:
        """One line for the log."""
        return "; ".join(f"{name}: {rows.summary()}" if name else rows.summary() for name, rows in self.rows.items())

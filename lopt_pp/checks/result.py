"""What came of a check."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

Figures = dict[str, str | float]
"""What a check has found, by name with its unit."""


class CheckFailed(Exception):
    """Something is not as it must be: what, and what to do."""


class NotHere(Exception):
    """A check that cannot be made on these devices, and why."""


@dataclass(frozen=True)
class Result:
    """Of one check.

    Attributes:
        name: of the check.
        outcome: `ok`, `FAIL`, or `skip` where the devices do not allow it.
        seconds: that it took.
        message: what is wrong and what to do, or why it was left out.
        figures: what was found.
    """

    name: str
    outcome: Literal["ok", "FAIL", "skip"]
    seconds: float
    message: str = ""
    figures: Mapping[str, str | float] = field(default_factory=dict)

    def line(self) -> str:
        """For the terminal."""
        if self.outcome == "FAIL":
            return f"FAIL  {self.name}: {self.message}"
        if self.outcome == "skip":
            return f"skip  {self.name}: {self.message}"
        figures = ", ".join(f"{name} {in_words(value)}" for name, value in self.figures.items())
        return f"ok    {self.name} ({self.seconds:.1f} s)  {figures}".rstrip()


def in_words(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def as_json(machine: Mapping[str, object], results: Sequence[Result]) -> str:
    """The file that `--json` writes: `machine`, `checks`, and whether all are `ok`."""
    checks = [asdict(result) for result in results]
    return json.dumps({"ok": has_passed(results), "machine": machine, "checks": checks}, indent=2) + "\n"


def has_passed(results: Sequence[Result]) -> bool:
    return bool(results) and all(result.outcome != "FAIL" for result in results)


def reason(texts: Sequence[str]) -> str:
    """The line that says why a run has failed, in what its processes have printed."""
    said = [line for text in texts for line in re.findall(r"lopt-pp: error: (.*)", text)]
    if said:
        return said[0].rstrip(".")
    errors = [line for text in texts for line in re.findall(r"^(?:\w+\.)*\w+(?:Error|Exception): .*", text, re.M)]
    if errors:
        return errors[-1]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"

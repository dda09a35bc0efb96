"""Constraints for pip: the oldest versions that pyproject.toml admits, the newest, or the tested ones between them.

    python .github/constraints.py oldest|tested|newest > FILE

Only what LoPT-PP itself depends on differs. The tools of its tests and of its docs stay at the versions of
constraints.txt, so that a test that fails tells of a dependency.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def constraints(versions: str, pyproject: str, tested: str) -> list[str]:
    """The lines of a constraints file.

    Args:
        versions: "oldest", "tested" or "newest".
        pyproject: the text of pyproject.toml.
        tested: the text of constraints.txt.

    Returns:
        One requirement each. A dependency that has no lower bound keeps its tested version in "oldest".

    Raises:
        ValueError: of an unknown word for `versions`, or of a dependency that is not a name with bounds.
    """
    if versions not in ("oldest", "tested", "newest"):
        raise ValueError(f"oldest, tested or newest, not {versions!r}")
    pins = [line for line in tested.splitlines() if line and not line.startswith("#")]
    if versions == "tested":
        return pins
    bounds = dict(map(_name_and_bounds, tomllib.loads(pyproject)["project"]["dependencies"]))
    lines = [pin for pin in pins if pin.partition("==")[0] not in bounds]
    for name, bound in bounds.items():
        lower = re.search(r">=\s*([\w.]+)", bound)
        if versions == "newest":
            lines.append(f"{name}{bound}")
        elif lower:
            lines.append(f"{name}=={lower[1]}")
        else:
            lines.extend(pin for pin in pins if pin.startswith(f"{name}=="))
    return lines


def _name_and_bounds(requirement: str) -> tuple[str, str]:
    split = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement)
    if split is None:
        raise ValueError(f"not a name with bounds: {requirement!r}")
    return split[1], split[2]


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt")]
    print("\n".join(constraints(sys.argv[1], *texts)))

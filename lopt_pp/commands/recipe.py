"""`lopt-pp recipe NAME > run.yaml`: a run to start from, as a YAML file. Without a name, which there are."""

from collections.abc import Sequence
from pathlib import Path

from lopt_pp.commands.common import CommandParser
from lopt_pp.errors import LoptError

PACKAGE = Path(__file__).resolve().parents[1]


def recipes() -> dict[str, Path]:
    """The files, by their names: of an installed wheel beside its modules, of a checkout in `launch/recipes`."""
    for folder in (PACKAGE / "recipes", PACKAGE.parent / "launch" / "recipes"):
        if found := {path.stem: path for path in sorted(folder.glob("*.yaml"))}:
            return found
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp recipe", description=__doc__)
    parser.add_argument("name", nargs="?", help="of the recipe; without it, all of them are listed")
    given, there = parser.read(arguments), recipes()
    if given.name is None:
        for name, path in there.items():
            print(f"{name:<20} {purpose(path)}")
        return 0
    if given.name not in there:
        raise LoptError(f"there is no recipe {given.name}; there are: {', '.join(there)}")
    print(there[given.name].read_text(encoding="utf-8"), end="")
    return 0


def purpose(recipe: Path) -> str:
    """What a recipe is for: the first sentence of its head."""
    first, *_ = recipe.read_text(encoding="utf-8").splitlines()
    return first.lstrip("# ").split(". ")[0].rstrip(".")

"""Writes the tables of docs/trl.md from `lopt_pp.config`, by which command lines, files and arguments are read, too.

python docs/site/trl_table.py        writes them anew; a test sees that they are up to date
"""

import re
from collections.abc import Iterator
from pathlib import Path

from lopt_pp.config.foreign_rules import MISSING, NO_EFFECT, SAME, Row
from lopt_pp.config.other_trainers import OLDER
from lopt_pp.config.trl_arguments import ARGUMENTS
from lopt_pp.config.trl_flags import TABLE

PAGE = Path(__file__).parent.parent / "trl.md"

SECTIONS = TABLE | {"Earlier versions": OLDER}


def tables() -> str:
    """All sections, from the heading of the first to the end of the last."""
    return "\n".join(line for title, rows in SECTIONS.items() for line in _section(title, rows))


def written(page: str) -> str:
    """The page with the tables of today."""
    start = page.index(f"### {next(iter(SECTIONS))}\n")
    script, arguments = page.index("## The script\n", start), page.index(_ARGUMENTS, start)
    return page[:start] + tables() + page[script:arguments] + "\n".join(_arguments())


_ARGUMENTS = "### Argument by argument\n"
"""The last section."""


def _arguments() -> Iterator[str]:
    yield from (_ARGUMENTS, f"Of `SFTTrainer`, {len(ARGUMENTS)} in all, in this order:", "")
    yield from ("| TRL | here | |", "|---|---|---|")
    yield from (f"| `{own.name}` | {own.here} | {own.note} |".replace("|  |", "| |") for own in ARGUMENTS)
    yield ""


def _section(title: str, rows: list[Row]) -> Iterator[str]:
    yield from (f"### {title}", "", "| TRL | here | |", "|---|---|---|")
    for row in rows:
        here = row.here if row.here in (SAME, NO_EFFECT, MISSING) else _code(row.here.split())
        yield f"| {_code(row.flags)} | {here} | {row.note} |".replace("|  |", "| |")
    yield ""


def _code(names: list[str]) -> str:
    return ", ".join(f"`--{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(re.sub(r"[ \t]+\n", "\n", written(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")

"""The pages of the documentation, those beside README.md and docs/, and the code in them."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RUNS = {"bash", "python"}
"""The languages of what a reader is to run."""

_MARK = re.compile(r"<!-- ([a-z ]+): (.*) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: that it is on.
        line: of its fence, from 1.
        language: after the fence.
        code: in it.
        marks: the comments right before it, by what they say.
    """

    page: Path
    line: int
    language: str
    code: str
    marks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is to run here, and not only to be looked at."""
        return self.language in RUNS and not self.marks.keys() & {"file", "needs", "takes", "tested by"}


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    marks: dict[str, str] = {}
    fence: tuple[str, str] | None = None
    start, code = 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence is not None:
            if line.strip() == fence[0]:
                yield Block(page, start, fence[1], textwrap.dedent("\n".join(code)) + "\n", marks)
                fence, marks = None, {}
            else:
                code.append(line)
        elif opening := re.match(r"\s*(`{3,})\s*(\S*)", line):
            fence, start, code = (opening[1], opening[2]), number, []
        elif mark := _MARK.fullmatch(line.strip()):
            marks[mark[1]] = mark[2]
        elif line.strip():
            marks = {}


def without_fences(text: str) -> str:
    """The text with its fenced blocks left out, but for their line ends."""
    fenced = re.compile(r"^([ ]*)(`{3,}).*?^\1\2$", re.MULTILINE | re.DOTALL)
    return fenced.sub(lambda block: "\n" * block[0].count("\n"), text)


def indented_code(text: str) -> Iterator[tuple[int, str]]:
    """The lines that Markdown takes for code by their indentation alone, and their numbers.

    Such a line is four spaces deeper than the text, or the list item, that it belongs to, and continues no paragraph.
    """
    depth, in_paragraph = 0, False
    for number, line in enumerate(without_fences(text).expandtabs(4).splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            in_paragraph = False
        elif not in_paragraph and indent >= depth + 4:
            yield number, line
        else:
            item = re.match(r"\s*([-*+]|\d+[.)])\s+", line)
            depth = len(item[0]) if item else min(depth, indent)
            in_paragraph = not line.startswith(("#", "<!--"))

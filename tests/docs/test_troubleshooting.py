"""docs/troubleshooting.md quotes what the program says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LEFT_OUT = "\0"


def said() -> list[str]:
    """Every text in the program's code, with a mark in place of what is filled in."""
    texts = []
    for path in (ROOT / "lopt_pp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else _LEFT_OUT for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub("%[sd]", _LEFT_OUT, node.value))
    return texts


def quotes() -> list[str]:
    """What the page says that the program says: the first cells of the tables with that heading."""
    found, is_said = [], False
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        if line.startswith("| it says"):
            is_said = True
        elif not line.startswith("|"):
            is_said = False
        elif is_said and not line.startswith("|---"):
            found += re.findall("`([^`]+)`", line.split(" | ")[0])
    return found


SAID = said()


def is_said(quote: str) -> bool:
    pieces = (re.escape(piece) for piece in quote.split("..."))
    pattern = re.compile(f"{_LEFT_OUT}".join(pieces).replace(_LEFT_OUT, f".*{_LEFT_OUT}.*"), re.DOTALL)
    return any(pattern.search(text) for text in SAID)


@pytest.mark.parametrize("quote", quotes())
def test_a_quoted_message_exists(quote: str) -> None:
    assert is_said(quote), "the program does not say this"


def test_what_the_program_does_not_say() -> None:
    assert len(quotes()) > 20
    assert is_said("unknown flag ...") and is_said("does not share ... with rank 0")
    assert not is_said("does not share ... with rank 1")
    assert not is_said("unknown ... did you mean")

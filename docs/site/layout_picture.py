"""Draws the rooms of the package: docs/layout.svg.

    python docs/site/layout_picture.py        draws it anew; a test sees that it is up to date

The rows are those of the contract in pyproject.toml that the tests check, the words are the first lines of the rooms'
own docstrings. So the picture says what is enforced.
"""

import ast
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "layout.svg"

_WIDTH, _ROW, _GAP, _MARGIN = 900, 80, 12, 16

_STYLE = """\
  <style>
    @media (prefers-color-scheme: dark) {
      svg { fill: #e4e7eb; }
      [fill="#ffffff"] { fill: #20242c; }
      [fill="#52606d"] { fill: #a3b1c2; }
      [fill="#e8f1fb"] { fill: #1b2a3d; }
      [stroke="#3178c6"] { stroke: #6aa9ee; }
    }
  </style>"""


def rows() -> list[list[str]]:
    """The rooms, row by row, from the top; each imports from rows below its own only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    return [[room.strip() for room in row.split("|")] for row in contract["layers"]]


def purpose(room: str) -> str:
    """What a room is for: the first paragraph of its docstring."""
    path = ROOT / "lopt_pp" / room / "__init__.py"
    if not path.exists():
        path = ROOT / "lopt_pp" / f"{room}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def picture() -> str:
    """The picture as SVG."""
    drawn, height = [], 2 * _MARGIN + len(rows()) * (_ROW + _GAP) - _GAP
    for number, row in enumerate(rows()):
        width = (_WIDTH - 2 * _MARGIN - (len(row) - 1) * _GAP) / len(row)
        y = _MARGIN + number * (_ROW + _GAP)
        for place, room in enumerate(row):
            x = _MARGIN + place * (width + _GAP)
            is_file = not (ROOT / "lopt_pp" / room).is_dir()
            name = f"{room}.py" if is_file else f"{room}/"
            drawn.append(
                f'  <rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_ROW}" rx="6" fill="#e8f1fb" '
                f'stroke="#3178c6"/>\n'
                f'  <text x="{x + 12:.1f}" y="{y + 22}" font-weight="600">{name}</text>'
            )
            for line, text in enumerate(
                textwrap.wrap(purpose(room), int(width / 6.9), max_lines=3, placeholder=" ...")
            ):
                drawn.append(
                    f'  <text x="{x + 12:.1f}" y="{y + 40 + 15 * line}" font-size="11.5" fill="#52606d">'
                    f"{escape(text.replace('`', ''))}</text>"
                )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="13" fill="#1f2933">',
            _STYLE,
            f'  <rect width="{_WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
            *drawn,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")

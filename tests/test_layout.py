"""The rooms of the package import from rooms below their own only; pyproject.toml has the rows."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_rooms_import_from_rooms_below_only() -> None:
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    result = subprocess.run([*lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_picture_is_drawn_from_the_contract() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "site" / "layout_picture.py"))
    assert drawn["PICTURE"].read_text() == drawn["picture"](), "run: python docs/site/layout_picture.py"


def test_each_room_says_what_it_is_for_what_it_may_know_and_where_to_start() -> None:
    rooms = sorted(path for path in (ROOT / "lopt_pp").iterdir() if (path / "__init__.py").exists())
    assert rooms
    for room in rooms:
        docstring = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
        assert len(docstring.split("\n\n")) == 2 and len(docstring.splitlines()) >= 4, room.name

"""The notebooks of docs/notebooks, executed: with a tiny model and few steps in place of what their first cell says."""

import re
from pathlib import Path

import nbformat
import pytest
from kernel import execute
from tiny import InputsWith

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def shown(cell: nbformat.NotebookNode, kind: str) -> list[str]:
    """What a cell shows of a kind, such as text/html."""
    data = [output["data"] for output in cell.get("outputs", []) if "data" in output]
    return [one[kind] for one in data if kind in one]


@by_notebook
def test_a_notebook_is_whole_and_shows_what_it_gave(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it again from top to bottom"
    text = path.read_text()
    assert not re.search(r"Traceback|Warning|stderr|widget-view|/home/|/root/|/tmp/", text)
    assert "image/png" in text and "Training Loss" in text
    links = re.findall(r"\]\((.+?)\)", "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"))
    assert links and all((FOLDER / link).is_file() for link in links)


@pytest.mark.slow
@by_notebook
def test_a_notebook_runs(path: Path, inputs_with: InputsWith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"model_name = {str(inputs_with() / 'model')!r}\nmax_steps = 4"
    execute(notebook, tmp_path, monkeypatch)
    (table, *_) = [table for cell in notebook.cells for table in shown(cell, "text/html") if "Training Loss" in table]
    assert "[4/4 " in table
    last = shown(notebook.cells[-1], "text/plain")
    if path.stem == "train":
        assert last[-1] == "0.0", "two processes gave other weights than one"
    assert (tmp_path / "out" / "report.html").exists() or (tmp_path / "compare.html").exists()

"""Runs notebooks by the Python that runs the tests, whatever kernels the machine knows."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def execute(notebook: nbformat.NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs all cells in a folder; what they show is in the notebook afterwards.

    Raises:
        CellExecutionError: one fails.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(folder / "jupyter"))
    kernel = folder / "jupyter" / "kernels" / "own"
    kernel.mkdir(parents=True)
    start = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "own", "language": "python"}))
    NotebookClient(notebook, timeout=200, kernel_name="own", resources={"metadata": {"path": str(folder)}}).execute()

"""A run in a notebook: the table of transformers grows while it trains."""

from pathlib import Path

import nbformat
import pytest
from kernel import execute

CELL = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from lopt_pp import Trainer

rows = [{{"prompt": f"what is {{number}}?", "completion": str(number)}} for number in range(20)]
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained("{model}"),
    {{"output_dir": "out", "max_steps": 6, "eval_steps": 3, "logging_steps": 1, "save_steps": 0}},
    train_dataset=rows[4:], eval_dataset=rows[:4], processing_class=AutoTokenizer.from_pretrained("{model}"),
)
result = trainer.train()
"""


@pytest.mark.slow
def test_the_table_of_a_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages in the kernel's process; the callbacks' thread shows it in the cell that trains."""
    cells = [
        nbformat.v4.new_code_cell(CELL.format(model=inputs / "model")),
        nbformat.v4.new_code_cell("assert result and result.global_step == 6 and trainer.model is not None"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    execute(notebook, tmp_path, monkeypatch)
    shown = [output["data"]["text/html"] for output in cells[0].outputs if "text/html" in output.get("data", {})]
    (table,) = shown  # It is brought up to date, not shown anew.
    assert "[6/6 " in table and "<th>Training Loss</th>" in table and "<th>Validation Loss</th>" in table
    assert "<td>3</td>" in table and "<td>6</td>" in table

"""A step of which no row can be used has no loss, and a line names its rows."""

import json
from pathlib import Path

import pytest
from transformers import TrainerCallback

from lopt_pp import Trainer
from lopt_pp.report.run_data import read_run


def test_a_step_without_a_target_token(inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "what is 1?", "completion": "x" * (60 if number < 4 else 2)} for number in range(8)]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"train_file": file, "streaming": True, "shuffle_dataset": False, "max_length": 60, "num_stages": 2}
    more = {"per_device_train_batch_size": 2, "max_steps": 8, "logging_steps": 1, "save_steps": 0}
    trainer = Trainer(inputs / "model", {"output_dir": out, **flags, **more}, callbacks=[TrainerCallback])
    result = trainer.train()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    assert list(losses) == [3, 4, 7, 8] and min(losses.values()) > 0
    assert [record["step"] for record in records if "reconstruction_loss" in record] == [3, 4, 7, 8]
    assert [logs["step"] for logs in trainer.state.log_history if "loss" in logs] == [3, 4, 7, 8]
    assert result.training_loss == pytest.approx(sum(losses.values()) / 4)
    row = f"row 1 of {file} is longer than --max_length 60"
    for step in (1, 2, 5):
        assert caplog.text.count(f"step {step} has no target token, and so no loss: row ") == 1
    assert f"step 1 has no target token, and so no loss: {row}, row 2 of" in caplog.text
    assert caplog.text.count("further steps have no target token, and no loss") == 1
    assert read_run(out).local_loss(0) == "reconstruction_loss"

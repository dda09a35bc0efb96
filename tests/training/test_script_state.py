"""What a script does around a run: it goes elsewhere, turns gradients off, goes on from what is not there."""

import shutil
from pathlib import Path

import pytest
import torch

from lopt_pp import LoptError, RunError, Trainer
from lopt_pp.config.parser import load_config
from lopt_pp.training.script_state import anchored


def test_a_script_that_goes_elsewhere_and_turns_gradients_off(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trains where the paths of its arguments led, and leaves both as they were."""
    shutil.copytree(inputs, tmp_path / "here")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = {"max_steps": 1, "train_file": "rows.jsonl", "eval_file": "few=rows.jsonl", "save_steps": 0}
    trainer = Trainer("model", {"output_dir": "out", **flags})
    monkeypatch.chdir(elsewhere)
    with torch.inference_mode():
        before = trainer.evaluate()["eval_few_loss"]
        assert trainer.train() and torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert trainer.evaluate()["eval_few_loss"] < before and not torch.is_grad_enabled()
    trainer.save_model("copy")  # Of this one the script says only now where it is.
    assert trainer.model.num_parameters() > 0
    assert [path.name for path in elsewhere.iterdir()] == ["copy"]
    assert (tmp_path / "here" / "out" / "model.safetensors.index.json").exists() or list(
        (tmp_path / "here" / "out").glob("*.safetensors")
    )


def test_paths_and_what_only_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "then").mkdir()
    for name in ("rows.jsonl", "more.jsonl", "model"):
        (tmp_path / "then" / name).touch()
    monkeypatch.chdir(tmp_path / "then")
    config = load_config(
        model_name_or_path="model",
        chat_template_path="an-org/a-model",
        output_dir="out",
        datasets=[{"path": "more.jsonl"}, {"path": "an-org/rows", "split": "test"}, {"path": "*.jsonl"}],
        eval_file=["easy=easy.jsonl", "hard=/hard.jsonl"],
        resume_from_checkpoint="latest",
        logging_dir="logs",
    )
    assert anchored(config, tmp_path / "then") is config and anchored(config, None) is config
    monkeypatch.chdir(tmp_path)
    led, then = anchored(config, tmp_path / "then"), tmp_path / "then"
    assert led.model.model_name_or_path == str(then / "model") and led.run.output_dir == str(then / "out")
    assert led.data.chat_template_path == "an-org/a-model"
    paths = [entry["path"] for entry in led.data.datasets or ()]
    assert paths == [str(then / "more.jsonl"), "an-org/rows", str(then / "*.jsonl")]
    assert led.evaluation.eval_file == [f"easy={then / 'easy.jsonl'}", "hard=/hard.jsonl"]
    assert led.checkpoint.resume_from_checkpoint == "latest" and led.report.logging_dir == str(then / "logs")
    assert led.optim is config.optim


def test_there_must_be_something_to_go_on_from(inputs: Path, tmp_path: Path) -> None:
    """As in transformers; the flag's `latest` begins where there is nothing, for jobs that are started again."""
    args = {"output_dir": tmp_path / "out", "train_file": inputs / "rows.jsonl", "max_steps": 1}
    trainer = Trainer(inputs / "model", args)
    with pytest.raises(RunError, match=r"^resume_from_checkpoint=True: no checkpoint in .*/out; call train\(\) "):
        trainer.train(resume_from_checkpoint=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(LoptError, match="elsewhere is not a complete checkpoint"):
        trainer.train(resume_from_checkpoint=tmp_path / "elsewhere")

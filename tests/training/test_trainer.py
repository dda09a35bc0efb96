"""Training from a script."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import environment, run, torchrun
from ranks import until
from transformers import AutoModelForCausalLM

import lopt_pp
from lopt_pp import LoptError, RunError, Trainer, load_config
from lopt_pp.config.parser import parse_config


def flags(inputs: Path, out: Path, **more: object) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model_name_or_path": inputs / "model",
        "train_file": inputs / "rows.jsonl",
        "output_dir": out,
    }
    return given | {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, **more}


def test_the_package_is_light() -> None:
    """`lopt-pp --help` does not wait for torch; nor does `import lopt_pp`."""
    code = "import sys, lopt_pp.cli; sys.exit('torch' in sys.modules or not lopt_pp.LoptError)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0
    assert all(getattr(lopt_pp, name) is not None for name in lopt_pp.__all__)
    with pytest.raises(AttributeError, match="module 'lopt_pp' has no attribute 'Trayner'"):
        lopt_pp.Trayner  # noqa: B018


def test_a_config_from_flags_by_name_a_list_and_a_file(tmp_path: Path) -> None:
    words = "--model_name_or_path m --train_file rows.jsonl --output_dir out --max_steps -1 --shuffle_dataset false "
    expected = parse_config([*words.split(), "--learning_rate", "1e-5", "--lr_scheduler_type", "cosine"])
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: m\ntrain_file: rows.jsonl\nlearning_rate: 3.0\nmax_steps: 7\n")
    named = {"output_dir": Path("out"), "max_steps": -1, "shuffle_dataset": False, "learning_rate": 1e-5}
    named["lr_scheduler_type"] = expected.optim.lr_scheduler_type
    assert load_config(file, **named) == load_config(str(file), **named) == expected
    assert load_config(words.split(), learning_rate=1e-5, lr_scheduler_type="cosine") == expected


def test_mistakes_in_a_config() -> None:
    with pytest.raises(LoptError, match=r"unknown flag --lerning_rate=1; did you mean --learning_rate\?"):
        load_config(model_name_or_path="m", train_file="r", output_dir="o", lerning_rate=1)
    with pytest.raises(LoptError, match="load_config: a int; give the path of a YAML file, or a dict of flags"):
        load_config(3)  # type: ignore[arg-type]
    with pytest.raises(LoptError, match="--save_total_limit: None is not a value of a flag; leave it out"):
        load_config(save_total_limit=None)


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    trainer = Trainer(load_config(**flags(inputs, out)))
    with pytest.raises(LoptError, match=f"--output_dir {out} has no trained model"):
        trainer.model  # noqa: B018
    assert trainer.train()
    return trainer


def test_alone(inputs: Path, alone: Trainer) -> None:
    assert (alone.rank, alone.name) == (0, "stages 0, 1 (rank 0)")
    before = AutoModelForCausalLM.from_pretrained(inputs / "model").state_dict()
    after = alone.model.state_dict()
    assert after.keys() == before.keys()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in after.items() if "proj" in name)


def test_what_transformers_has_and_this_has_not(alone: Trainer, tmp_path: Path) -> None:
    """Is named with what does the same, and a subclass does not replace it in vain."""
    assert alone.is_world_process_zero() and not hasattr(alone, "predict")
    with pytest.raises(AttributeError, match=r"'Trainer' object has no attribute 'predict': evaluate\(rows\) measures"):
        alone.predict  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="^'Trainer' object has no attribute 'nothing'$"):
        alone.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(LoptError, match=r"^Own\.compute_loss would never be called: .* an objective"):
        type("Own", (Trainer,), {"compute_loss": lambda self, model, inputs: 0})
    with pytest.raises(LoptError, match="^there are no rows to train on: give train_dataset, or train_file or"):
        Trainer("m", {"output_dir": tmp_path / "out"})
    again = type("Own", (Trainer,), {"hello": print})(alone.config)
    with pytest.raises(RunError, match="already holds a model; give another, or --overwrite_output_dir"):
        again.train()


@pytest.mark.parametrize("objective", ["reconstruction", "own_objective:Undetermined"])
def test_full_determinism(inputs: Path, tmp_path: Path, alone: Trainer, objective: str) -> None:
    """Changes nothing on a CPU, and ends a run that has an operator which cannot keep to it."""
    given = flags(inputs, tmp_path / "out", full_determinism=True, local_objective=objective)
    trainer = Trainer(load_config(**given))
    if objective != "reconstruction":
        with pytest.raises(RunError, match="^--full_determinism: the model has an operator without .* put_ does not"):
            trainer.train()
        return
    assert trainer.train() and not torch.are_deterministic_algorithms_enabled()
    before = alone.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_failure(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Leaves no directories behind that were not there."""
    trainer = Trainer(load_config(**flags(inputs, tmp_path / "deep" / "out", train_file="nothing.jsonl")))
    with pytest.raises(RunError, match="--train_file nothing.jsonl does not exist") as failure:
        trainer.train()
    assert isinstance(failure.value.__cause__, LoptError)
    assert "nothing.jsonl" not in capfd.readouterr().err, "it is raised, and not printed as well"
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError):
        Trainer(load_config(**flags(inputs, tmp_path / "out", train_file="nothing.jsonl"))).train()
    assert (tmp_path / "out").exists()


def test_what_the_end_needs_is_tried_at_the_start(inputs: Path, tmp_path: Path) -> None:
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    (model / "generation_config.json").write_text('{"num_return_sequences": 4}')
    trainer = Trainer(load_config(**flags(inputs, tmp_path / "out", model_name_or_path=model)))
    with pytest.raises(RunError, match=r"its generation_config.json cannot be used: Greedy .*; mend the file"):
        trainer.train()
    assert not (tmp_path / "out").exists()


def test_in_a_thread(inputs: Path, alone: Trainer, tmp_path: Path) -> None:
    """Python lets no thread but the main one take signals."""
    trainer = Trainer(load_config(**flags(inputs, tmp_path / "out")))
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(bool(trainer.train())))
    thread.start()
    thread.join()
    assert results == [True]
    got = trainer.model.state_dict()
    assert all(torch.equal(tensor, got[name]) for name, tensor in alone.model.state_dict().items())


def test_processes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LoptError, match="3 processes do not fit --num_stages 2"):
        Trainer(load_config(model_name_or_path="m", train_file="r", output_dir="o"))


def test_a_signal(inputs: Path, tmp_path: Path) -> None:
    """Stops the run, and leaves the script with its own handlers."""
    out, before = tmp_path / "out", signal.getsignal(signal.SIGUSR1)
    trainer = Trainer(load_config(**flags(inputs, out, max_steps=100_000)))

    def interrupt() -> None:
        until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 4)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert not trainer.train()
    thread.join()
    assert (out / "stopped.json").exists()
    assert signal.getsignal(signal.SIGUSR1) == before


SCRIPT = """
import sys
from transformers import TrainerCallback
from lopt_pp import Trainer, load_config

class Counting(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1

counting = Counting()
trainer = Trainer(load_config(sys.argv[1:], logging_steps=1), callbacks=[counting])
before = trainer.evaluate()["eval_loss"]
assert trainer.train().global_step == 4
measured = [logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs]
after = trainer.evaluate()["eval_loss"]
assert measured == [after] and after < before, (before, measured, after)
assert counting.steps == (4 if trainer.rank == 0 else 0)
if trainer.rank == 0:
    print("parameters:", trainer.model.num_parameters())
"""


@pytest.mark.slow
def test_two_processes(inputs: Path, alone: Trainer, tmp_path: Path) -> None:
    """Give the same weights."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = flags(inputs, tmp_path / "out", eval_file=inputs / "rows.jsonl", eval_steps=0)
    words = [f"--{name}={value}" for name, value in given.items()]
    result = run(torchrun(2, str(script), *words))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"parameters: {alone.model.num_parameters()}\n"
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, got[name]) for name, tensor in alone.model.state_dict().items())

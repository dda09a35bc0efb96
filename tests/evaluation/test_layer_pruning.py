"""`lopt-pp auxiliary`: leaves out the layers that are missed least, and gives a flag that training takes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import leave_out
from tiny import write_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_pp.cli
from lopt_pp.config.model import ModelConfig
from lopt_pp.data import DataConfig, TokenizedRows, load_rows
from lopt_pp.evaluation.layer_pruning import prune_layers
from lopt_pp.evaluation.losses import load_blocks, load_whole, loss_on
from lopt_pp.objectives import ObjectiveConfig, task_objective

CPU = torch.device("cpu")
TASK = task_objective(ObjectiveConfig())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers that differ in how much they do, and rows."""
    folder = tmp_path_factory.mktemp("pruning")
    write_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        for number, factor in enumerate((1, 6, 2, 9)):
            model.model.layers[number].mlp.down_proj.weight *= factor
    model.save_pretrained(folder / "model")
    write_rows(folder / "rows.jsonl", number=12, seed=3)
    return folder


def rows_of(files: Path) -> TokenizedRows:
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    rows = load_rows(DataConfig(train_file=[str(files / "rows.jsonl")]), tokenizer)
    assert isinstance(rows, TokenizedRows)
    return rows


def loss_without(files: Path, rows: TokenizedRows, numbers: list[int]) -> float:
    """Of the whole model of transformers, some layers passed by, computed by hand."""
    model = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    leave_out(model, "model.layers", numbers)
    total, count = 0.0, 0
    for row in range(len(rows)):
        ids, labels = (torch.tensor(part)[None] for part in (rows[row].input_ids, rows[row].labels))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != -100).sum())
    return total / count


def test_each_time_the_layer_that_is_missed_least_goes(files: Path) -> None:
    rows = rows_of(files)
    whole = loss_on(load_whole(ModelConfig(str(files / "model"))), TASK, rows, CPU, "whole").value
    front, rest = load_blocks(ModelConfig(str(files / "model")), [1])
    steps = list(prune_layers(front, rest, 1, TASK, rows, CPU))
    assert [len(step.layers) for step in steps] == [3, 2, 1]
    gone: list[int] = []
    for before, after in zip(steps, steps[1:], strict=False):
        losses = {layer: loss_without(files, rows, [*gone, layer]) for layer in before.layers}
        (left_out,) = set(before.layers) - set(after.layers)
        assert left_out == min(losses, key=losses.__getitem__)
        assert after.loss == pytest.approx(losses[left_out], rel=1e-5)
        gone.append(left_out)
    (again,) = prune_layers(front, rest, 3, TASK, rows, CPU)
    assert steps[0] == again and again.loss == pytest.approx(whole, rel=1e-6), "the model is whole again"


@pytest.mark.slow
def test_training_takes_what_it_prints(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--train_file", str(files / "rows.jsonl"), "--device", "cpu"]
    asked = ["auxiliary", str(files / "model"), *flags, "--auxiliary_layers", "2", "--split", "1", "--limit", "5"]
    assert lopt_pp.cli.main(asked) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["layers", "loss", "left", "out"] and len(printed) == 4
    assert re.fullmatch(r"--auxiliary_choice [123],[123]", printed[-1])
    command = [sys.executable, "-m", "lopt_pp.train", "--model_name_or_path", str(files / "model"), *flags[:2]]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--per_device_train_batch_size", "2"]
    command += ["--pipeline_processes", "1", "--split", "1", "--report_to", "none", "--local_objective", "next_token"]
    result = subprocess.run([*command, *printed[-1].split()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["flags"]["auxiliary_choice"] == printed[-1].split()[1]


def test_layers_that_give_more_than_hidden_states(files: Path) -> None:
    """Some families' layers give a tuple, as others did in former versions of transformers."""
    rows = rows_of(files)
    front, rest = load_blocks(ModelConfig(str(files / "model")), [1])
    expected = list(prune_layers(front, rest, 1, TASK, rows, CPU))
    for layer in rest.layers:
        layer.register_forward_hook(lambda layer, args, output: output[0])  # What runs the layers wants a tensor.
        layer.forward = lambda *args, run=layer.forward, **kwargs: (run(*args, **kwargs), "more")
    assert list(prune_layers(front, rest, 1, TASK, rows, CPU)) == expected


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--auxiliary_layers 3", "--auxiliary_layers 3: 2 follow the cut; give 1 to as many"),
        ("--auxiliary_layers 0", "--auxiliary_layers 0: 2 follow the cut"),
        ("--auxiliary_layers 1 --split 4", "--split 4: the model has 4 layers; give 1 to 3"),
        ("--auxiliary_layers 1 --train_file none.jsonl", "--train_file none.jsonl"),
    ],
)
def test_mistakes(files: Path, flags: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["auxiliary", str(files / "model"), "--train_file", str(files / "rows.jsonl"), "--device", "cpu"]
    assert lopt_pp.cli.main([*asked, *flags.split()]) == 1
    assert error in capsys.readouterr().err

"""Flags of the commands besides `train` and `plan`: how they may be spelt, and what is said of others."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from lopt_pp import cli
from lopt_pp.commands.common import device_and_dtype


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("submit run.yaml --gpus_per_nod 2", "unknown flag --gpus_per_nod; did you mean --gpus-per-node?"),
        (
            "submit run.yaml --learning_rate 1e-4",
            "unknown flag --learning_rate; flags of the run belong into RUN_YAML, and those of sbatch come after --",
        ),
        (
            "submit run.yaml --lr 3",
            "unknown flag --lr; flags of the run belong into RUN_YAML, and those of sbatch come after --",
        ),
        ("generate m --prompt p --max-new-tokenz 3", "unknown flag --max-new-tokenz; did you mean --max_new_tokens?"),
        ("report a b", "unknown flag b; see --help"),
        ("report", "the following arguments are required: RUN_DIR"),
        (
            "generate",
            "the following arguments are required: --prompt, MODEL; the text to answer goes behind it: "
            'lopt-pp generate MODEL --prompt "TEXT"',
        ),
        ("completion", "the following arguments are required: bash|zsh|fish"),
        ("chat", "the following arguments are required: MODEL"),
        ("export", "the following arguments are required: CHECKPOINT, MODEL"),
        ("generate m --prompt p --seed x", "--seed: invalid int value: 'x'"),
    ],
)
def test_a_mistake_is_one_line(line: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(line.split())
    assert left.value.code == 2
    assert capsys.readouterr() == ("", f"lopt-pp {line.split()[0]}: error: {error}\n")


@pytest.mark.parametrize("flags", ["--gpus_per_node=2 --dry_run", "--gpus-per-node 2 --dry-run"])
def test_dashes_and_underscores_are_the_same(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}))
    Path("run.yaml").write_text("model_name_or_path: a-model\ntrain_file: rows.jsonl\noutput_dir: out\n")
    assert cli.main(["submit", "run.yaml", *flags.split(), "--", "--some_flag"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --gpus-per-node=2\n" in script and "#SBATCH --some_flag\n" in script


@pytest.mark.parametrize(
    "line",
    [
        "export ~/gone out",
        "generate ~/gone --prompt p",
        "evaluate ~/gone --eval_file rows.jsonl",
        "auxiliary ~/gone --train_file rows.jsonl --auxiliary_layers 1",
        "plan ~/gone",
        "submit ~/gone",
        "report ~/gone",
        "compare ~/gone ~/gone",
        "train --config=~/gone",
    ],
)
def test_paths_begin_at_home(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `--flag=~/x` and in quotes, where no shell puts it there."""
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.main(line.split()) != 0
    error = capsys.readouterr().err
    assert "/home/me/gone" in error and error.count("\n") == 1


def test_a_gpu_that_pytorch_cannot_use_means_the_cpu_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def set_device(device: torch.device) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # As NVML counts.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    given = argparse.Namespace(device=None, dtype="auto")
    assert device_and_dtype(given) == (torch.device("cpu"), torch.float32)
    assert "since PyTorch cannot use the GPU: The NVIDIA driver on your system is too old" in capsys.readouterr().err

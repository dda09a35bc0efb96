"""What a command does not use it does not import: the answer to `--help` takes a fraction of a second."""

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import about, record, write_run

HEAVY = ("torch", "transformers", "datasets", "trl", "numpy", "pandas")
"""Libraries that take long to import."""

# In a process of its own, since here PyTorch is imported already. As its last line it prints which were imported.
RUN = f"""
import sys
from lopt_pp.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as left:
    status = left.code
print(*(name for name in {HEAVY} if name in sys.modules))
sys.exit(status)
"""


def run(*arguments: object) -> tuple[int, str, list[str]]:
    """Runs `lopt-pp` with these arguments; returns its exit status, its output and the heavy libraries it imported."""
    words = [sys.executable, "-c", RUN, *map(str, arguments)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    *lines, imported = result.stdout.splitlines()
    return result.returncode, "\n".join(lines) + result.stderr, imported.split()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an objective that ships with the program, with a rate that the report warns of."""
    records = [record(stage, step, {"forward": 0.9}, loss=2.0) for step in range(1, 5) for stage in (0, 1)]
    flags = {"local_objective": "next_token", "learning_rate": 1e-4, "local_learning_rate": 1e-3}
    return write_run(tmp_path_factory.mktemp("run"), records, about([(0, 15), (15, 30)], [[0], [1]], **flags))


def test_an_import_would_be_seen() -> None:
    """Whoever asks for a device waits for PyTorch, which knows the devices."""
    status, text, imported = run("generate", "a-model", "--prompt", "a", "--device", "nonsense")
    assert status == 2 and "--device: nonsense is not a device" in text and "torch" in imported


@pytest.mark.parametrize(
    "command",
    ["", "train", "export", "generate", "evaluate", "plan", "auxiliary", "check", "submit", "report", "compare", "env"],
)
def test_help_imports_nothing_heavy(command: str) -> None:
    status, text, imported = run(*command.split(), "--help")
    assert status == 0 and text.startswith("usage: ") and "lopt-pp" in text
    assert imported == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("nonsense", "invalid choice: 'nonsense'"),
        ("trian run.yaml", "invalid choice: 'trian'; did you mean train?"),
        ("run.yaml", "invalid choice: 'run.yaml'; lopt-pp train run.yaml trains"),
        ("generate a-model --prompt a --temperature -1", "--temperature at least 0"),
        (
            "generate a-model text",
            "required: --prompt; the text to answer goes behind it: lopt-pp generate MODEL",
        ),
        ("evaluate a-model", "nothing to measure"),
        ("train --lerning_rate 1", "required: --model_name_or_path"),
        (
            "train --model_name_or_path m --train_file r --output_dir o --lerning_rate 1",
            "did you mean --learning_rate?",
        ),
        ("plan a-model --lerning_rate 1", "did you mean --learning_rate?"),
        ("submit no-such.yaml", "no-such.yaml does not exist"),
        ("auxiliary a-model --train_file rows.jsonl --auxiliary_layers 2 --limit 0", "--limit: at least 1"),
    ],
)
def test_mistakes_in_the_flags_are_told_at_once(arguments: str, error: str) -> None:
    status, text, imported = run(*arguments.split())
    assert status == 2 and error in text
    assert imported == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("evaluate ./gone --tasks gsm8k", "./gone: no such directory"),
        ("generate ./gone --prompt a", "./gone: no such directory"),
    ],
)
def test_what_is_not_there_is_told_at_once(arguments: str, error: str) -> None:
    status, text, imported = run(*arguments.split())
    assert status == 1 and f"lopt-pp: error: {error}" in text
    assert imported == []


def test_a_report_imports_nothing_heavy(run_dir: Path) -> None:
    status, text, imported = run("report", run_dir)
    assert status == 0 and f"the report is {run_dir / 'report.html'}" in text
    assert "which is above the safe range for next_token" in text
    assert imported == []


def test_a_comparison_imports_nothing_heavy(run_dir: Path, tmp_path: Path) -> None:
    status, text, imported = run("compare", run_dir, run_dir, "--output", tmp_path / "both.html")
    assert status == 0 and f"the comparison is {tmp_path / 'both.html'}" in text
    assert imported == []


def test_a_completion_imports_nothing_heavy() -> None:
    status, text, imported = run("completion", "bash")
    assert status == 0 and "--local_objective" in text
    assert imported == []


def test_a_job_script_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: a-model\ntrain_file: {tmp_path}/*.jsonl\noutput_dir: {tmp_path}/out\n"
    )
    status, text, imported = run("submit", tmp_path / "run.yaml", "--gpus-per-node", "2", "--dry-run")
    assert status == 0 and text.startswith("#!")
    assert imported == []


def test_the_module_that_trains_imports_nothing_heavy_for_its_help() -> None:
    """`python -m lopt_pp.train --help`; the flags are read in it as well, of which one is missing."""
    code = f"""
import runpy, sys
import lopt_pp.train
assert lopt_pp.train.main(["--output_dir", "out"]) == 2
try:
    runpy.run_module("lopt_pp.train", run_name="__main__", alter_sys=True)
except SystemExit as left:
    assert left.code == 0
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: torchrun ") and result.stdout.endswith("\n\n")


def test_flags_are_read_without_anything_heavy() -> None:
    """By all of the config room, which none of these may enter."""
    code = f"""
import importlib, pkgutil, sys
import lopt_pp, lopt_pp.config
for module in pkgutil.iter_modules(lopt_pp.config.__path__, "lopt_pp.config."):
    importlib.import_module(module.name)
lopt_pp.load_config(["--model_name_or_path", "m", "--train_file", "r", "--output_dir", "o"]).flags()
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n", "")

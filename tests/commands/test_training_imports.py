"""What a command does not use it does not import: torch and transformers take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import environment

HEAVY = ("datasets", "numpy", "pandas", "safetensors", "torch", "transformers", "trl")

PROGRAM = """
import runpy, sys

def exits():
    module, *sys.argv[1:] = sys.argv[1:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        return left.code

status = exits()
print(status, *sorted(set(HEAVY) & sys.modules.keys()), file=sys.stderr)
""".replace("HEAVY", repr(HEAVY))


def imported(*arguments: str) -> tuple[str, str]:
    """What `python -m MODULE ARGUMENTS` prints; its status, and which of the heavy packages it has imported."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [
        "lopt_pp.cli --help",
        "lopt_pp.cli train --help",
        "lopt_pp.train --help",
        "lopt_pp.cli plan --help",
        "lopt_pp.cli submit --help",
    ],
)
def test_help(command: str) -> None:
    text, left = imported(*command.split())
    assert text.startswith("usage: ")
    assert left == "0"


@pytest.mark.parametrize("command", ["lopt_pp.cli train", "lopt_pp.train", "lopt_pp.cli plan a-model"])
def test_a_mistake_in_a_flag(command: str) -> None:
    assert imported(*command.split(), "--lerning_rate", "1")[1] == "2"


def test_the_job_script_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: a-model\ntrain_file: {tmp_path}/*.jsonl\noutput_dir: {tmp_path}/out\n"
    )
    text, left = imported("lopt_pp.cli", "submit", str(tmp_path / "run.yaml"), "--gpus-per-node", "2", "--dry-run")
    assert text.startswith("#!")
    assert left == "0"


def test_flags_are_read_without_what_trains() -> None:
    """All of the config, and what it is read with."""
    code = f"""
import importlib, pkgutil, sys
import lopt_pp.config
for module in pkgutil.iter_modules(lopt_pp.config.__path__, "lopt_pp.config."):
    importlib.import_module(module.name)
lopt_pp.load_config(["--model_name_or_path", "m", "--train_file", "r", "--output_dir", "o"]).flags()
sys.exit(sorted(set({HEAVY!r}) & sys.modules.keys()) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")

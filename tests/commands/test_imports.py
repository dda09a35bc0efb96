"""What a command does not use it does not import: the answer to `--help` takes a fraction of a second."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import about, record, write_run

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
    assert status == 2 and "--device: nonsense is no device" in text and "torch" in imported


@pytest.mark.parametrize("command", ["", "export", "generate", "evaluate", "auxiliary", "report", "compare"])
def test_help_imports_nothing_heavy(command: str) -> None:
    status, text, imported = run(*command.split(), "--help")
    assert status == 0 and "usage: lopt-pp" in text
    assert imported == []


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("nonsense", "invalid choice: 'nonsense'"),
        ("generate a-model --prompt a --temperature -1", "--temperature at least 0"),
        ("evaluate a-model", "nothing to measure"),
        ("auxiliary a-model --train_file rows.jsonl --auxiliary_layers 2 --limit 0", "--limit: at least 1"),
    ],
)
def test_mistakes_in_the_flags_are_told_at_once(arguments: str, error: str) -> None:
    status, text, imported = run(*arguments.split())
    assert status == 2 and error in text
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

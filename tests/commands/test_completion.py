"""What a shell completes, asked of the shell."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lopt_pp import cli
from lopt_pp.commands.completion import command_names, whole_parser

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=()
$(complete -p lopt-pp | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


def written(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert cli.main(["completion", shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


def test_every_command_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in command_names())
    assert {line.split()[0] for line in text.splitlines() if re.match(r"  [a-z]", line)} == set(command_names())
    given = whole_parser().parse_args(["train", "run.yaml", "--local_objective", "none"])
    assert (given.run_yaml, given.local_objective) == ("run.yaml", "none")


def test_bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = written("bash", tmp_path, capsys)
    (tmp_path / "run.yaml").touch()

    def completed(*words: str) -> list[str]:
        command = ["bash", "-c", ASK, "bash", str(script), "lopt-pp", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
        return sorted(done.stdout.split())

    assert set(completed("")) >= set(command_names())
    assert completed("train", "--max_s") == ["--max_steps"]
    assert completed("train", "--backend", "") == ["auto", "gloo", "nccl"]
    assert completed("train", "run") == completed("plan", "--config", "run") == ["run.yaml"]
    assert completed("train", "--train_file", "run") == ["run.yaml"]
    assert completed("submit", "--max") == ["--max-restarts"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_another_shell_reads_it(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = written(shell, tmp_path, capsys)
    assert "local_objective" in script.read_text()
    if shutil.which(shell) is not None:
        subprocess.run([shell, "-n", str(script)], check=True, timeout=60)

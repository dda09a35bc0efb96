"""`lopt-pp recipe`: the recipes of launch/recipes, wherever it is installed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

import lopt_pp.cli
from lopt_pp.commands import recipe

FOLDER = ROOT / "launch" / "recipes"


def test_all_are_listed_with_what_they_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert lopt_pp.cli.main(["recipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert "two_gpus             Two GPUs: full fine-tuning of an 8B model, half of it on each" in lines


def test_one_is_printed_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lopt_pp.cli.main(["recipe", "two_gpus"]) == 0
    assert capsys.readouterr().out == (FOLDER / "two_gpus.yaml").read_text()
    # Of a wheel, which has them beside its modules.
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text("# Own: a run.\nmax_steps: 1\n")
    monkeypatch.setattr(recipe, "PACKAGE", tmp_path)
    assert lopt_pp.cli.main(["recipe", "own"]) == 0
    assert capsys.readouterr().out == "# Own: a run.\nmax_steps: 1\n"
    assert lopt_pp.cli.main(["recipe", "two_gpus"]) == 1
    assert capsys.readouterr().err == "lopt-pp: error: there is no recipe two_gpus; there are: own\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_error(unbuffered: str) -> None:
    """As in `lopt-pp recipe two_gpus | head`."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "lopt_pp", "recipe", "two_gpus"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_no_command_at_all_shows_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert lopt_pp.cli.main([]) == 2
    assert "lopt-pp recipe two_gpus > run.yaml" in capsys.readouterr().err

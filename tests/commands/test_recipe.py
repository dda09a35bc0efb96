"""`lopt-pp recipe`: the recipes of launch/recipes, wherever it is installed."""

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

"""What a run is refused for at once: before the command loads PyTorch, and with nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lopt_pp import cli
from lopt_pp.checkpoint.lock import Holder, hold, this_holder
from lopt_pp.errors import LoptError


@pytest.fixture
def words(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run that nothing is wrong with, and that does not begin: what loads PyTorch says so."""

    def load(*arguments: object) -> int:
        raise LoptError("PyTorch is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lopt_pp.train.train", load)
    monkeypatch.setattr("lopt_pp.commands.train._launch", load)
    given = f"train --model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir out"
    return given.split()


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a run that comes no further than its flags, or than that PyTorch is loaded."""
    assert cli.main(words) == 2
    *_, last = capsys.readouterr().err.splitlines()
    return last.removeprefix("lopt-pp: error: ")


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("--train_file gone.jsonl", "--train_file gone.jsonl does not exist"),
        ("--eval_file gone.jsonl", "--eval_file gone.jsonl does not exist"),
        ("--output_dir file", "--output_dir file is a file; give a directory"),
        ("--output_dir link", "--output_dir link is a link to nowhere, which is not there; make that directory"),
        ("--output_dir link/out", "--output_dir link/out: link is a link to nowhere, which is not there"),
        ("--output_dir file/below", "--output_dir file/below cannot be written: Not a directory"),
        ("--output_dir earlier", "--output_dir earlier holds checkpoint-7 of an earlier run; --resume_from_checkpoint"),
        ("--report_to flyte", "--report_to flyte needs the package flytekit, which is not installed: pip install"),
        ("--num_stages 9", "--num_stages 9 is more than the model's 4 layers; give at most 4"),
        ("--model_name_or_path ./gone", "--model_name_or_path ./gone: no such directory"),
        (
            "--model_name_or_path gone",
            "--model_name_or_path gone: there is no such directory, nor a model of this name",
        ),
        (
            "--model_name_or_path bare",
            "--model_name_or_path bare: there is no tokenizer beside the model (",
        ),
        (
            "--output_dir earlier --resume_from_checkpoint earlier/checkpoint-9",
            "--resume_from_checkpoint earlier/checkpoint-9 is not a complete checkpoint; latest is earlier/check",
        ),
        ("--output_dir deep/er/out", "PyTorch is loaded"),
        ("--output_dir earlier --resume_from_checkpoint latest", "PyTorch is loaded"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(
    words: list[str], mistake: str, said: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "earlier" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / file).symlink_to(inputs / "model" / file)
    before = sorted(tmp_path.rglob("*"))
    assert refused([*words, *mistake.split()], capsys).startswith(said)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_not_a_name_of_a_data_set(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").touch()
    given = [word if word != "--train_file" else "--dataset_name" for word in words]
    given[given.index("--dataset_name") + 1] = "rows.csv"
    assert refused(given, capsys) == "--dataset_name rows.csv is a file; give it as --train_file rows.csv"


def test_a_directory_that_another_run_has(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out", this_holder("launch", 0)):
        error = refused(words, capsys)
        assert error.startswith(f"--output_dir out is in use by another run (process {os.getpid()} on ")
    assert refused(words, capsys) == "PyTorch is loaded"


def test_what_only_watching_can_tell_is_left_to_the_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock of another machine, whose run may be dead."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.setattr("lopt_pp.util.process.Process.is_alive", lambda process: None)
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out", Holder(this_holder("", 0).process, "launch", 0, "", 0)):
        assert refused(words, capsys) == "PyTorch is loaded"


def test_nothing_heavy_is_imported_for_it(inputs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lopt_pp.config.parser import parse_config; "
        "from lopt_pp.training.first_checks import check_before_loading; "
        "check_before_loading(parse_config(sys.argv[1:])); "
        "print(*({'torch', 'transformers', 'datasets', 'numpy'} & {*sys.modules}))"
    )
    given = f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {tmp_path}/out"
    ran = subprocess.run([sys.executable, "-c", code, *given.split()], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "\n", "")

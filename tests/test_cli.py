"""How a command ends, which has nothing to do for it."""

import sys
from types import SimpleNamespace

import pytest
from launching import run

from lopt_pp import cli
from lopt_pp.errors import LoptError, UsageError


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (LoptError("there is no file"), 1, "lopt-pp: error: there is no file\n"),
        (UsageError("--flag 0: at least 1"), 2, "lopt-pp: error: --flag 0: at least 1\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_command_raises(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("importlib.import_module", lambda name: SimpleNamespace(main=main))
    assert cli.main(["env"]) == status
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_needs_no_standard_streams(closed: str) -> None:
    done = run(["sh", "-c", f"exec {sys.executable} -m lopt_pp recipe two_gpus {closed}"])
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed == "2>&-")

"""How a command ends, which has nothing to do for it."""

from types import SimpleNamespace

import pytest

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

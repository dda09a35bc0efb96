"""Where code of the user's own is looked for, and what is said where it is not found."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import environment

from lopt_pp.errors import LoptError
from lopt_pp.util.user_code import (
    UserCodeError,
    load_user_function,
    load_user_object,
    search_current_directory,
    source_digest,
)

MODULE = """\
class Reward:
    @staticmethod
    def length(text):
        return len(text)

def double(number):
    return 2 * number

five = 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, which is not on the path, as where a console script runs."""
    path = [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "bin"), *path])
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("own_code.py").write_text(MODULE)
    known = set(sys.modules)
    yield tmp_path / "here"
    for name in set(sys.modules) - known:
        del sys.modules[name]


def load(name: str) -> object:
    return load_user_object("--reward", name, "a function of yours as package.module:function")


def test_the_current_directory_is_searched_and_stays_in_the_last_place(here: Path) -> None:
    before = list(sys.path)
    assert load("own_code:five") == 5
    assert sys.path == [*before, str(here)]
    assert load("own_code:Reward.length")("abc") == 3  # type: ignore[operator]
    assert sys.path == [*before, str(here)]


@pytest.mark.parametrize("place", ["", "here"])
def test_a_path_that_has_it_stays_as_it_is(here: Path, place: str) -> None:
    sys.path.insert(0, str(here) if place else "")
    before = list(sys.path)
    assert load("own_code:five") == 5 and sys.path == before


def write(folder: Path, **modules: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_the_users_module_wins_while_it_is_imported_and_libraries_afterwards(here: Path, tmp_path: Path) -> None:
    """As `python -m` has it: a file of the user's is not mistaken for a library of the same name."""
    own = "import own_helper\nwho = own_helper.who\ndef later():\n    import own_later\n    return own_later.who\n"
    write(here, own_rewards=own, own_helper="who = 'mine'\n", own_later="who = 'mine'\n", own_alone="who = 'mine'\n")
    library = dict.fromkeys(("own_rewards", "own_helper", "own_later"), "who = 'a library'\n")
    sys.path.append(str(write(tmp_path / "libraries", **library)))
    assert load("own_rewards:who") == "mine"
    assert load("own_rewards:later")() == "a library"  # type: ignore[operator]
    assert load("own_alone:who") == "mine"


def test_the_directory_of_a_script_of_ones_own_comes_first(here: Path, tmp_path: Path) -> None:
    write(tmp_path / "bin", own_rewards="who = 'the script'\n")
    write(here, own_rewards="who = 'the current directory'\n")
    assert load("own_rewards:who") == "the script"


def test_a_path_without_a_directory_of_a_script(here: Path, tmp_path: Path) -> None:
    """`python -P` puts none on it, so that the first place is that of a library, as one on PYTHONPATH."""
    libraries = write(tmp_path / "libraries", own_rewards="who = 'a library'\n")
    write(here, own_rewards="who = 'mine'\n")
    command = "from lopt_pp.util.user_code import load_user_object as load; print(load('--x', 'own_rewards:who', ''))"
    path = {"PYTHONPATH": f"{libraries}:{environment()['PYTHONPATH']}"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", command], env=environment() | path, capture_output=True, text=True
    )
    assert result.stdout == "mine\n", result.stderr


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("double", "^--reward double: give a function of yours as package.module:function$"),
        ("own_code:", "^--reward own_code:: give a function of yours"),
        (":double", "^--reward :double: give a function of yours"),
        ("no.such:f", "^--reward no.such:f: no.such cannot be imported: ModuleNotFoundError: No module named 'no'$"),
        ("own_code:gone", "^--reward own_code:gone: own_code has no gone$"),
        ("own_code:Reward.gone", "^--reward own_code:Reward.gone: own_code has no Reward.gone$"),
        ("raises:f", "^--reward raises:f: raises cannot be imported: RuntimeError: half written$"),
        ("lacks:f", "^--reward lacks:f: lacks cannot be imported: AttributeError: module 'sys' has no attribute 'f'$"),
        ("exits:f", "^--reward exits:f: exits cannot be imported: SystemExit: 3$"),
        ("spelt:f", "^--reward spelt:f: spelt cannot be imported: SyntaxError: "),
    ],
)
def test_what_cannot_be_loaded(here: Path, name: str, error: str) -> None:
    texts = {"raises": "raise RuntimeError('half written')", "lacks": "import sys; sys.f", "spelt": "def f(:"}
    write(here, **texts, exits="raise SystemExit(3)")
    before = list(sys.path)
    with pytest.raises(LoptError, match=error) as raised:
        load(name)
    assert isinstance(raised.value, UserCodeError) == ("give" not in error)
    assert [entry for entry in sys.path if entry != str(here)] == before


def test_what_cannot_be_called() -> None:
    with pytest.raises(LoptError, match="^--reward own_code:five is not a function, but 5$"):
        load_user_function("--reward", "own_code:five", "")


def test_a_function_is_loaded_again_in_the_process_that_it_is_sent_to(here: Path, tmp_path: Path) -> None:
    """There too it is the user's own, although the path that the process inherits has libraries first."""
    function = load_user_function("--reward", "own_code:double", "")
    assert function(4) == 8 and pickle.loads(pickle.dumps(function))(4) == 8
    libraries = write(tmp_path / "libraries", own_code="def double(number):\n    return 'a library'\n")
    command = (
        "import json, pickle, sys; sys.path[:] = json.loads(sys.argv[1]);"
        "print(pickle.loads(bytes.fromhex(sys.argv[2]))(4))"
    )
    path = [sys.path[0], str(libraries), *sys.path[1:]]
    arguments = [json.dumps(path), pickle.dumps(function).hex()]
    result = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    assert result.stdout == "8\n", result.stderr


def test_the_digest_is_that_of_the_source(here: Path) -> None:
    load("own_code:five")
    before = source_digest("own_code:five")
    assert before == source_digest("own_code:double") and before
    write(here, own_code=MODULE + "\n# changed\n")
    assert source_digest("own_code:five") != before
    load("sys:path")
    assert source_digest("sys:path") == ""


def test_a_current_directory_that_has_been_removed(here: Path) -> None:
    before = list(sys.path)
    for file in here.iterdir():
        file.unlink()
    os.rmdir(here)
    search_current_directory()
    assert sys.path == before and load("json:dumps") is json.dumps

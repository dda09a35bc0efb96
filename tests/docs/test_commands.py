"""Every command and every piece of Python in README.md and docs/ runs here, or says why not.

The blocks of a page run from top to bottom in a folder of their own, which has `model` (a tiny one), `rows.jsonl` and
the repository's files under their names. Comments before a block say what is to be done with it:

    <!-- file: run.yaml -->      it is what this file holds; a later block uses it
    <!-- before: cp -r a b -->   a command to run first
    <!-- needs: gpu -->          it cannot run here: see NEEDS. Its flags are checked none the less.
    <!-- takes: long -->         nor that; the scripts that it names are seen to start
    <!-- tested by: tests/... --> something else runs it

A block that is made by indentation alone fails: it could not be marked.
"""

import contextlib
import functools
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import yaml
from launching import environment
from pages import PAGES, ROOT, RUNS, Block, blocks_of, indented_code, without_fences

from lopt_pp import cli
from lopt_pp.config.parser import parse_run
from lopt_pp.errors import LoptError

NEEDS = {"cloud", "docker", "gpu", "hub", "kubernetes", "machines", "registry", "slurm", "trl"}
MARKS = {"file", "before", "needs", "takes", "tested by"}
SHOWN = {"json", "text", "yaml", "jinja"}
STARTERS = {"python", "bash", "lopt-pp", "torchrun"}

_SHELL = re.compile(r"[$`*|&;<>]|^[A-Z_]+=", re.MULTILINE)

BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in RUNS | SHOWN, f"a block of the language {block.language!r}"
    assert block.marks.keys() <= MARKS
    if "needs" in block.marks:
        assert set(block.marks["needs"].split(", ")) <= NEEDS
    if "takes" in block.marks:
        assert block.marks["takes"] == "long"
    if "tested by" in block.marks:
        path, _, test = block.marks["tested by"].partition("::")
        assert not test or f"def {test}(" in (ROOT / path).read_text()
        assert (ROOT / path).is_file()
    if "file" in block.marks:
        later = [other.code for other in BLOCKS if other.page == block.page and other.line > block.line]
        assert any(block.marks["file"] in code for code in later), "a file that no block uses"
    if block.language == "text" and re.search(r"^\$ ", block.code, re.MULTILINE):
        assert "tested by" in block.marks, "a command with its output, which nothing compares"
    if block.language == "yaml":
        yaml.safe_load(block.code)
    if block.language == "json":
        for line in block.code.splitlines():
            json.loads(line)
    if block.language == "python":
        compile(block.code, str(block), "exec")


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in RUNS and not b.runs and "file" not in b.marks], ids=str
)
def test_a_command_that_does_not_run_here_has_flags_and_scripts_that_exist(block: Block) -> None:
    for words in commands_of(block.code):
        check_words(words)
        if (flags := flags_of_run(words)) is not None:
            parse_run(flags)
    if "takes" in block.marks:
        for script in re.findall(r"\S+\.(?:py|sh)\b", block.code):
            if script.endswith(".sh"):
                assert subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True).returncode == 0
            else:
                assert status_of_help(script) == 0
        for module in re.findall(r"-m (benchmarks\.\S+)", block.code):
            assert status_of_help("-m", module) == 0


def flags_of_run(words: list[str]) -> list[str] | None:
    """The flags of a command that trains; None where it does not, or has them in a file."""
    line = " ".join(words)
    if found := re.search(r"(?:lopt-pp train|lopt_pp\.train) ?(.*)", line):
        return None if ".yaml" in found[1] else found[1].split()
    # Of a script they are the last ones, and have underscores.
    first = next((n for n, word in enumerate(words) if re.fullmatch("--[a-z]+(_[a-z]+)+", word)), len(words))
    return words[first:] if "launch/torchrun/" in line else None


@functools.cache
def status_of_help(*program: str) -> int:
    """Of a script, or of `-m` and a module."""
    return forked.run([sys.executable, *program, "--help"], cwd=ROOT).returncode


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_fenced(page: Path) -> None:
    """By backticks, so that it is found here and can be marked."""
    text = page.read_text(encoding="utf-8")
    assert not list(indented_code(text)) and not re.search("^ *~~~", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_name_what_exists(page: Path) -> None:
    for code in re.findall(r"`([^`]+)`", without_fences(page.read_text(encoding="utf-8"))):
        words = code.split()
        if words[1:] and words[0] in STARTERS:
            check_words(words)


def commands_of(code: str) -> Iterator[list[str]]:
    """The words of each command of a block."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        if words:
            yield words


def are_our_own(code: str) -> bool:
    """Whether all commands of a block are `lopt-pp ...`, with nothing that takes a shell, and may run in this process.

    That spares each of them the start of Python and its libraries. Training sets up logging and is not among them.
    """
    return not _SHELL.search(code) and all(words[0] == "lopt-pp" and words[1] != "train" for words in commands_of(code))


def check_words(words: list[str]) -> None:
    """Sees that the scripts, modules and subcommands of a command exist, and that its flags are known somewhere."""
    for position, word in enumerate(words):
        if re.fullmatch(r"[\w/.-]+\.(py|sh)", word) and "/" in word:
            assert (ROOT / word).is_file(), f"{word} does not exist"
        if words[position - 1] == "-m" and word.startswith(("lopt_pp.", "benchmarks.")):
            path = ROOT / word.replace(".", "/")
            assert path.with_name(f"{path.name}.py").is_file() or (path / "__main__.py").is_file(), f"no module {word}"
        if words[position - 1] == "lopt-pp" and position and word.isalpha():
            assert f"\n  {word} " in commands(), f"no command {word}"
        if words[0] != "trl" and (flag := re.match("--([a-z]+(?:_[a-z]+)+)", word)):
            assert re.search(rf"\b{flag[1]}\b", all_code()), f"no flag {flag[0]}"


@functools.cache
def commands() -> str:
    """What `lopt-pp --help` says."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        cli.main(["--help"])
    return shown.getvalue()


@functools.cache
def all_code() -> str:
    """All that may know a flag."""
    folders = ("lopt_pp", "benchmarks", "launch", "tests")
    files = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return "".join(path.read_text() for path in files if path.parent != Path(__file__).parent)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs for block in blocks_of(page))], ids=str)
def test_the_commands_of_a_page_run(page: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "rows.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    for name in ("benchmarks", "launch", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if "file" in block.marks:
            (tmp_path / block.marks["file"]).write_text(block.code)
        if not block.runs:
            continue
        if "before" in block.marks:
            subprocess.run(shlex.split(block.marks["before"]), check=True)
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), namespace)
            continue
        if are_our_own(block.code):
            for words in commands_of(block.code):
                assert cli.main(words[1:]) == 0, f"{block}: {shlex.join(words)}"
            continue
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code], env=env, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"


def test_what_would_be_missed(tmp_path: Path) -> None:
    """The checks themselves see a flag, a script and a mark that are wrong."""
    page = ROOT / "docs" / "page.md"
    with pytest.raises(AssertionError, match="no flag --max_lenght"):
        check_words(["python", "-m", "benchmarks.speed.trainer", "--max_lenght", "3"])
    with pytest.raises(AssertionError, match="no module benchmarks.no_such"):
        check_words(["python", "-m", "benchmarks.no_such", "--quick"])
    with pytest.raises(AssertionError, match="no_such.sh does not exist"):
        check_words(["bash", "launch/no_such.sh"])
    with pytest.raises(AssertionError, match="no command fly"):
        check_words(["lopt-pp", "fly"])
    flags = "lopt-pp train --model_name_or_path m --train_file r --output_dir o --queue_depth two\n"
    with pytest.raises(LoptError, match="queue_depth"):
        test_a_command_that_does_not_run_here_has_flags_and_scripts_that_exist(
            Block(page, 1, "bash", flags, {"needs": "gpu"})
        )
    for wrong in (
        Block(page, 1, "sh", ""),
        Block(page, 1, "bash", "", {"needs": "luck"}),
        Block(page, 1, "text", "$ lopt-pp report out\nthe report is out/report.html\n"),
    ):
        with pytest.raises(AssertionError):
            test_a_block_says_what_it_is(wrong)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("Text\n\n    lopt-pp report out\n    lopt-pp report in\n", [3, 4]),
        ("# Heading\n    --eval_steps 100\n", [2]),
        ("- item\n\n      python train.py\n", [3]),
        ("1. item\n\n       python train.py\n", [3]),
        ("- item\n\nText\n\n\tpython train.py\n", [5]),
        ("<!-- needs: gpu -->\n    python train.py\n", [2]),
        ("```bash\nbash a.sh \\\n    --seed 1\n```\n\n    bash b.sh\n", [6]),
        ("Text that goes on with\n    --seed 1\n", []),
        (
            "- item that goes on with\n      --seed 1\n\n  and has more text\n\n    - and items\n\n      of its own\n",
            [],
        ),
        ("- item\n\n  ```bash\n  bash a.sh \\\n      --seed 1\n  ```\n", []),
    ],
)
def test_code_by_indentation_is_seen(text: str, lines: list[int]) -> None:
    assert [number for number, _ in indented_code(text)] == lines


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        ("lopt-pp plan model --num_stages 2\nlopt-pp report out  # a page\n", True),
        ('lopt-pp generate out --prompt "What is 1 + 2?"\n', True),
        ("lopt-pp train --config run.yaml\n", False),
        ("lopt-pp plan model --json > plan.json\n", False),
        ("HF_HUB_OFFLINE=1 lopt-pp plan model\n", False),
        ("lopt-pp report out\npython train.py\n", False),
    ],
)
def test_what_runs_without_a_shell(code: str, ours: bool) -> None:
    assert are_our_own(code) is ours

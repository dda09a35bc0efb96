"""What a public repository has besides code and docs: workflows, forms, settings of editors and of git hooks.

What runs on a code host alone cannot be run here. Its files are read instead, and what they name must be there.
"""

import configparser
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT
from tree import text_files

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
ACTIONS = sorted((GITHUB / "actions").glob("*/action.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CI = "ci.yml"

_FROM_THE_RUNNER = {"git", "shellcheck"}
"""Programs that the machines of the code host have."""
_MODULES = {"build", "pip", "pytest", "twine"}
"""What `python -m` may start."""


def workflow(path: Path) -> dict[Any, Any]:
    """A file of YAML. The key `on` is true there, as YAML 1.1 has it."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def steps(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of a workflow or an action."""
    content = workflow(path)
    for job in content.get("jobs", {}).values():
        yield from job.get("steps", [])
    yield from content.get("runs", {}).get("steps", [])


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each command of a workflow or an action."""
    for step in steps(path):
        for line in step.get("run", "").replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||;", line.partition(" > ")[0]):
                yield shlex.split(part, comments=True)


def check_command(words: list[str], programs: set[str]) -> None:
    """Sees that a command starts something that is there.

    Args:
        words: of the command.
        programs: that the environment has.
    """
    if words[0] == "xargs":
        words = [word for word in words[1:] if not word.startswith("-")]
    if words[:2] == ["python", "-m"]:
        assert words[2] in _MODULES, f"no module {words[2]}"
    elif words[0] in ("bash", "python"):
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
    else:
        assert words[0] in programs, f"no program {words[0]}"


def programs() -> set[str]:
    """What the extras of pyproject.toml install, and what is there anyway."""
    extras = [re.match(r"[\w-]+", name) for extra in PROJECT["optional-dependencies"].values() for name in extra]
    return {name[0] for name in extras if name} | set(PROJECT["scripts"]) | _FROM_THE_RUNNER


@pytest.mark.parametrize("path", [*WORKFLOWS, *ACTIONS], ids=lambda path: path.relative_to(GITHUB).as_posix())
def test_workflows_call_what_is_there(path: Path) -> None:
    for words in commands(path):
        check_command(words, programs())
    for step in steps(path):
        uses = step.get("uses", "")
        if uses.startswith("./"):
            assert (ROOT / uses / "action.yml").is_file(), f"{path.name} uses {uses}"
            assert step.get("with", {}).keys() <= workflow(ROOT / uses / "action.yml")["inputs"].keys()
        elif uses:
            assert re.search(r"[@:](v?\d[\w.]*|release/v\d+)$", uses), f"{path.name}: {uses} has no version"
    for job in workflow(path).get("jobs", {}).values():
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file(), f"{path.name} uses {job['uses']}"


def test_a_command_that_is_not_there_is_seen() -> None:
    for words, message in (
        (["bash", "tests/no_such.sh"], "no_such.sh does not exist"),
        (["python", "-m", "nose"], "no module nose"),
        (["xargs", "-0", "no-such-linter"], "no program no-such-linter"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_command(words, programs())


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_only_read_and_end_in_time(path: Path) -> None:
    content = workflow(path)
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 120, f"{path.name}: {name} has no limit"
        for step in job.get("steps", []):
            # What others may choose, such as the name of a tag, must not become a part of a script.
            assert "${{ github." not in step.get("run", ""), f"{path.name}: {name} puts a context into a script"


def test_ci_tests_the_ends_of_what_is_supported() -> None:
    jobs = workflow(GITHUB / "workflows" / CI)["jobs"]
    rows = jobs["tests"]["strategy"]["matrix"]["include"]
    assert [row["versions"] for row in rows] == ["oldest", "newest"]
    oldest, newest = (row["python"] for row in rows)
    assert PROJECT["requires-python"] == f">={oldest}"
    minors = [int(name.rpartition(".")[2]) for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert minors == list(range(int(oldest.partition(".")[2]), int(newest.partition(".")[2]) + 1))
    action = workflow(ACTIONS[0])["inputs"]
    assert action["python"]["default"] == oldest
    assert ["bash", ".ci/run"] in commands(GITHUB / "workflows" / CI)
    assert jobs["everything"]["container"].startswith(f"python:{oldest}-"), (
        "where .ci/run is root, and finds its Python"
    )


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name)
def test_issue_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert all(field["attributes"]["label"] for field in fields)
    for named in re.findall(r"[\w/]+\.md", path.read_text(encoding="utf-8")):
        assert (ROOT / named).is_file(), f"{path.name} names {named}"


def test_git_hooks_run_the_projects_own_tools() -> None:
    """Those of CI, in the versions of constraints.txt; nothing is fetched."""
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = [hook["entry"].split() for hook in repositories[0]["hooks"]]
    assert {words[0] for words in hooks} == {"ruff", "mypy"}
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"ruff", "mypy"} <= set(pinned)
    in_ci = [words[:2] for words in commands(GITHUB / "workflows" / CI) if words[0] in ("ruff", "mypy")]
    assert sorted(words[:2] if words[0] == "ruff" else words for words in hooks) == sorted(in_ci)


def test_files_are_as_the_editor_is_told() -> None:
    settings = configparser.ConfigParser()
    settings.read_string("[top]\n" + (ROOT / ".editorconfig").read_text(encoding="utf-8"))
    assert settings["*"]["charset"] == "utf-8" and settings["*"]["end_of_line"] == "lf"
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert int(settings["*"]["max_line_length"]) == ruff["line-length"]
    found = 0
    for path in text_files():
        text = path.read_bytes().decode("utf-8")
        assert not text or text.endswith("\n"), f"{path.relative_to(ROOT)} ends within a line"
        assert not re.search(r"[ \t\r]$", text, re.MULTILINE), (
            f"{path.relative_to(ROOT)} has spaces at the end of a line"
        )
        found += 1
    assert found > 200

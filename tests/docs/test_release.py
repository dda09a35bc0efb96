"""What is released: its version, its files, its address; and that the check of a release sees what is wrong there."""

import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from launching import environment
from pages import ROOT
from tree import text_files

import lopt_pp

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SETTINGS: dict[str, Any] = tomllib.loads(PYPROJECT)
PROJECT = SETTINGS["project"]
VERSION = PROJECT["version"]


of_the_repository = pytest.mark.skipif(
    (ROOT / "PKG-INFO").exists(), reason="a source archive has more, and a README with the package index's links"
)


def script(name: str) -> ModuleType:
    """A script of .github as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".github" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = script("check_release")
constraints = script("constraints").constraints
with_absolute_links = script("index_readme").with_absolute_links


def test_the_version_is_there_without_torch() -> None:
    assert lopt_pp.__version__ == version("lopt-pp")
    code = "import sys, lopt_pp; print(lopt_pp.__version__, 'torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [version("lopt-pp"), "False"]


def test_the_repository_is_a_draft_that_only_lacks_an_address_and_a_day() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert not list(check.changelog(text, VERSION, draft=True))
    assert not list(check.citation((ROOT / "CITATION.cff").read_text(encoding="utf-8"), PROJECT))


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"]
    paper = citation["preferred-citation"]
    assert paper["url"] == PROJECT["urls"]["Paper"] == "https://arxiv.org/abs/2605.04913"
    assert all(author.keys() == {"given-names", "family-names"} for author in paper["authors"])


@of_the_repository
def test_the_address_is_in_one_place() -> None:
    ours = {PROJECT["urls"]["Repository"].removeprefix("https://"), *(who["email"] for who in PROJECT["authors"])}
    files = [path for path in text_files() if path != ROOT / "pyproject.toml"]
    holders = [path for path in files if any(name in path.read_text(encoding="utf-8") for name in ours)]
    assert not holders
    assert all(
        url.startswith(PROJECT["urls"]["Repository"]) for name, url in PROJECT["urls"].items() if name != "Paper"
    )


def test_a_placeholder_is_refused() -> None:
    name = check.PLACEHOLDER
    project = {
        "urls": {"Issues": f"https://example.org/{name}/issues"},
        "authors": [{"name": "A", "email": f"{name}@a.b"}],
    }
    assert [message.partition(" is ")[0] for message in check.address(project)] == [
        "pyproject.toml: urls.Issues",
        "pyproject.toml: authors, email",
    ]
    project = {"urls": {"Issues": "https://example.org/issues"}, "authors": [{"name": "A", "email": "a@a.b"}]}
    assert not list(check.address(project))


@pytest.mark.parametrize(
    ("heading", "draft", "release"),
    [
        ("1.2.0 (2027-01-31)", True, True),
        ("1.2.0 (unreleased)", True, False),
        ("1.2.0", False, False),
        ("1.2.0 (31 January)", False, False),
        ("1.2.1 (2027-01-31)", False, False),
        ("Unreleased", False, False),
    ],
)
def test_the_changelog_begins_with_the_version(heading: str, draft: bool, release: bool) -> None:
    text = f"# Changelog\n\n## {heading}\n\n- New.\n\n## 1.2.0 (2026-01-31)\n"
    assert (not list(check.changelog(text, "1.2.0", draft=True))) is draft
    assert (not list(check.changelog(text, "1.2.0", draft=False))) is release


def test_a_citation_of_another_version_is_refused() -> None:
    project = {"version": "1.2.0", "license": "MIT", "authors": [{"name": "The authors"}]}
    text = "version: 1.1.0\nlicense: MIT\nauthors:\n  - name: Others\n"
    assert list(check.citation(text, project)) == [
        "CITATION.cff: version is 1.1.0, and 1.2.0 in pyproject.toml",
        "CITATION.cff: name is Others, and The authors in pyproject.toml",
    ]


RECIPES = {f"lopt_pp/recipes/{path.name}": path.read_bytes() for path in (ROOT / "launch" / "recipes").glob("*.yaml")}
"""By their names in a wheel, where setup.py puts them."""


def package_files() -> dict[str, bytes]:
    """The package's files by their names in a wheel."""
    files = [path for path in (ROOT / "lopt_pp").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


def write_archive(folder: Path, names: Iterable[str]) -> Path:
    """A source archive of empty files of these names."""
    path = folder / f"lopt_pp-{VERSION}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"lopt_pp-{VERSION}/{name}"))
    return path


def write_wheel(folder: Path, files: dict[str, bytes], of_version: str = VERSION) -> Path:
    """A wheel as setuptools would make it of these files."""
    info = f"lopt_pp-{of_version}.dist-info"
    entries = io.StringIO()
    for group, found in {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}.items():
        entries.write(f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in found.items()))
    about = f"Name: lopt-pp\nVersion: {of_version}\nDescription-Content-Type: text/markdown\n\nText\n"
    path = folder / f"lopt_pp-{of_version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", about)
        archive.writestr(f"{info}/entry_points.txt", entries.getvalue())
    return path


def test_a_wheel_with_all_files_passes(tmp_path: Path) -> None:
    assert not list(check.wheel(write_wheel(tmp_path, package_files() | RECIPES), ROOT, VERSION))


def test_a_wheel_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    files = package_files() | RECIPES
    template = next(name for name in files if name.endswith(".jinja"))
    module = PROJECT["scripts"]["lopt-pp"].partition(":")[0].replace(".", "/") + ".py"
    for name, message in (
        ("lopt_pp/py.typed", "lacks lopt_pp/py.typed"),
        (template, f"lacks {template}"),
        ("lopt_pp/recipes/two_gpus.yaml", "lacks lopt_pp/recipes/two_gpus.yaml"),
        (module, "console_scripts, lopt-pp: no module"),
    ):
        path = write_wheel(tmp_path, {other: files[other] for other in files if other != name})
        assert message in "\n".join(check.wheel(path, ROOT, VERSION))


def test_a_wheel_with_other_files_or_of_another_version_is_refused(tmp_path: Path) -> None:
    path = write_wheel(tmp_path, package_files() | RECIPES | {"tests/tiny.py": b""})
    assert list(check.wheel(path, ROOT, VERSION)) == [
        f"{path.name}: has tests/tiny.py, which is not a file of the package"
    ]
    path = write_wheel(tmp_path, package_files() | RECIPES, "9.9.9")
    assert list(check.wheel(path, ROOT, VERSION)) == [f"{path.name}: not of version {VERSION}"]


def test_the_check_of_a_build(tmp_path: Path) -> None:
    """As the workflow calls it: status 0 for a draft of this repository, 1 with a line for each thing that is wrong."""
    write_wheel(tmp_path, package_files() | RECIPES)

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / ".github" / "check_release.py"), str(tmp_path), *flags]
        return subprocess.run(command, capture_output=True, text=True)

    lacking = run("--draft")
    assert lacking.returncode == 1 and "1 wheels and 0 source archives" in lacking.stderr
    write_archive(tmp_path, ["PKG-INFO", *check.tracked(ROOT)])
    assert run("--draft", "--tag", f"v{VERSION}").returncode == 0
    other = run("--draft", "--tag", "v9.9.9")
    assert other.returncode == 1 and other.stderr.startswith("the tag is v9.9.9")


def test_a_source_archive_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    files = ["lopt_pp/cli.py", "tests/conftest.py", "docs/index.md"]
    whole = write_archive(tmp_path, ["PKG-INFO", *files, "setup.cfg"])
    assert not list(check.source_archive(whole, VERSION, files))
    path = write_archive(tmp_path, ["PKG-INFO", *files[:2]])
    assert list(check.source_archive(path, VERSION, files)) == [f"{path.name}: lacks docs/index.md (see MANIFEST.in)"]
    assert list(check.source_archive(whole, "9.9.9", files)) == [f"{path.name}: not of version 9.9.9"]
    path.write_bytes(b"not one")
    assert "not a source archive" in next(check.source_archive(path, VERSION, files))


@of_the_repository
def test_the_source_archive_has_all_of_the_repository() -> None:
    """By MANIFEST.in; besides, setuptools takes the package and what it reads itself."""
    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    folders = {"lopt_pp", *(words[1] for words in rules if words[0] == "graft")}
    patterns = ["pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in"]
    patterns += [pattern for words in rules if words[0] == "include" for pattern in words[1:]]
    names = [path.relative_to(ROOT).as_posix() for path in text_files()]
    assert "tests/conftest.py" in names
    for name in names:
        assert name.split("/")[0] in folders or any(fnmatch(name, pattern) for pattern in patterns), name


def test_package_data_has_every_file_of_the_package() -> None:
    """Those that are not Python; and each folder with Python is a package, or setuptools would leave it out."""
    data: dict[str, list[str]] = SETTINGS["tool"]["setuptools"]["package-data"]
    named = {
        path.relative_to(ROOT).as_posix()
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = package_files()
    assert {name for name in files if not name.endswith(".py")} == named
    assert {str(Path(name).parent / "__init__.py") for name in files if name.endswith(".py")} <= files.keys()


def test_the_oldest_and_the_newest_versions_are_those_of_pyproject() -> None:
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line for line in tested.splitlines() if "==" in line]
    assert constraints("tested", PYPROJECT, tested) == pins
    oldest, newest = (constraints(word, PYPROJECT, tested) for word in ("oldest", "newest"))
    assert set(PROJECT["dependencies"]) <= set(newest)
    for name in ("torch", "transformers", "datasets", "trl"):
        found = next(line for line in PROJECT["dependencies"] if line.startswith(name))
        assert found.partition(",")[0].replace(">=", "==") in oldest
    for lines in (oldest, newest):  # The tools are the same in all.
        assert {pin for pin in pins if pin.startswith(("ruff", "mypy", "mkdocs"))} <= set(lines)
        assert len({line.partition("=")[0].rstrip("><") for line in lines}) == len(lines)


def test_bounds_become_constraints() -> None:
    pyproject = '[project]\ndependencies = ["a>=1.2", "b>=3,<4", "c"]\n'
    tested = "# Versions.\na==1.5\nb==3.1\nc==7\nd==8\n"
    assert constraints("tested", pyproject, tested) == ["a==1.5", "b==3.1", "c==7", "d==8"]
    assert constraints("oldest", pyproject, tested) == ["d==8", "a==1.2", "b==3", "c==7"]
    assert constraints("newest", pyproject, tested) == ["d==8", "a>=1.2", "b>=3,<4", "c"]
    with pytest.raises(ValueError, match="'latest'"):
        constraints("latest", pyproject, tested)


@of_the_repository
def test_the_readme_of_a_package_index_has_links_that_lead_somewhere() -> None:
    text = "![Two stages](docs/a.svg) [data](docs/data.md#rows), [here](#top), [paper](https://arxiv.org/abs/1)\n"
    assert with_absolute_links(text, "https://host/us/it", "v1.2.0") == (
        "![Two stages](https://host/us/it/raw/v1.2.0/docs/a.svg) "
        "[data](https://host/us/it/blob/v1.2.0/docs/data.md#rows), [here](#top), [paper](https://arxiv.org/abs/1)\n"
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = with_absolute_links(readme, "https://host/us/it", "v1.2.0")
    assert not re.search(r"\]\((?!https:|#)", changed) and changed != readme

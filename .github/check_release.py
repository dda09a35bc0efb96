"""Whether a release may go out: run it on what .github/build.sh has built.

    python .github/check_release.py DIRECTORY [--tag v0.1.0] [--draft]

Prints a line for each thing that is wrong, and exits with status 1 if there is one. With --draft, which every build
runs, the public address may still be missing and the changelog may say "unreleased".
"""

import argparse
import configparser
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from email import message_from_string
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = "lopt_pp"
PLACEHOLDER = "OWNER"


def address(project: dict[str, Any]) -> Iterator[str]:
    """What is wrong with who and where we are: the placeholder that pyproject.toml begins with.

    Args:
        project: the table of pyproject.toml.
    """
    fields = {f"urls.{name}": url for name, url in project["urls"].items()}
    for author in project["authors"]:
        fields |= {f"authors, {key}": value for key, value in author.items()}
    for field, value in fields.items():
        if PLACEHOLDER in value:
            yield f"pyproject.toml: {field} is still a placeholder ({value})"


def changelog(text: str, version: str, draft: bool) -> Iterator[str]:
    """What is wrong with the first heading of the changelog.

    Args:
        text: of CHANGELOG.md.
        version: of pyproject.toml.
        draft: whether "unreleased" may stand for the day.
    """
    heading = re.search(r"^## (.*)$", text, re.MULTILINE)
    found = heading[1] if heading else "nothing"
    if not re.fullmatch(rf"{re.escape(version)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", found):
        yield f"CHANGELOG.md: the first heading is {found!r}, and should be '{version} (YYYY-MM-DD)'"
    elif not draft and "unreleased" in found:
        yield f"CHANGELOG.md: the first heading is {found!r}: put the day of the release there, as YYYY-MM-DD"


def citation(text: str, project: dict[str, Any]) -> Iterator[str]:
    """Where CITATION.cff says something else than pyproject.toml.

    Args:
        text: of CITATION.cff.
        project: the table of pyproject.toml.
    """
    for key, expected in {
        "version": project["version"],
        "license": project["license"],
        "  - name": project["authors"][0]["name"],
    }.items():
        line = re.search(rf"^{key}: (.*)$", text, re.MULTILINE)
        found = line[1].strip('"') if line else "nothing"
        if found != expected:
            yield f"CITATION.cff: {key.strip(' -')} is {found}, and {expected} in pyproject.toml"


def wheel(path: Path, root: Path, version: str) -> Iterator[str]:
    """What a wheel lacks, or has too much.

    Args:
        path: of the wheel.
        root: of the checkout that it was built from; all files of the package belong into the wheel.
        version: of pyproject.toml.
    """
    files = [file for file in (root / PACKAGE).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    expected = {file.relative_to(root).as_posix() for file in files} | {f"{PACKAGE}/py.typed"}
    expected |= {f"{PACKAGE}/recipes/{recipe.name}" for recipe in (root / "launch" / "recipes").glob("*.yaml")}
    info = f"{PACKAGE}-{version}.dist-info"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        if f"{info}/METADATA" not in names:
            yield f"{path.name}: not of version {version}"
            return
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        entries = configparser.ConfigParser(delimiters="=")
        entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
    for name in sorted(expected - names):
        yield f"{path.name}: lacks {name} (see package-data in pyproject.toml)"
    for name in sorted(name for name in names - expected if not name.startswith(f"{info}/")):
        yield f"{path.name}: has {name}, which is not a file of the package"
    for section in entries.sections():
        for entry, target in entries[section].items():
            module = target.partition(":")[0].strip().replace(".", "/")
            if not names & {f"{module}.py", f"{module}/__init__.py"}:
                yield f"{path.name}: {section}, {entry}: no module {target}"
    if metadata["Description-Content-Type"] != "text/markdown":
        yield f"{path.name}: has no README"


def source_archive(path: Path, version: str, files: Iterable[str]) -> Iterator[str]:
    """What a source archive lacks.

    Args:
        path: of the archive.
        version: of pyproject.toml.
        files: of the repository, all of which belong there.
    """
    top = f"{PACKAGE}-{version}/"
    try:
        with tarfile.open(path) as archive:
            names = {name.removeprefix(top) for name in archive.getnames() if name.startswith(top)}
    except tarfile.TarError as error:
        yield f"{path.name}: not a source archive: {error}"
        return
    if "PKG-INFO" not in names:
        yield f"{path.name}: not of version {version}"
        return
    for name in sorted(set(files) - names):
        yield f"{path.name}: lacks {name} (see MANIFEST.in)"


def tracked(root: Path) -> list[str]:
    """The files of a checkout that git knows; none where it cannot tell."""
    listed = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def complaints(built: Path, root: Path, tag: str | None, draft: bool) -> Iterator[str]:
    """All that is wrong.

    Args:
        built: directory with one wheel and one source archive.
        root: of the checkout that they were built from.
        tag: of the release; None to leave it out.
        draft: whether to pass what only a release needs.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = project["version"]
    if tag is not None and tag != f"v{version}":
        yield f"the tag is {tag}, and should be v{version}, for the version of pyproject.toml"
    if not draft:
        yield from address(project)
    yield from changelog((root / "CHANGELOG.md").read_text(encoding="utf-8"), version, draft)
    yield from citation((root / "CITATION.cff").read_text(encoding="utf-8"), project)
    wheels, archives = sorted(built.glob("*.whl")), sorted(built.glob("*.tar.gz"))
    if (len(wheels), len(archives)) != (1, 1):
        yield f"{built}: {len(wheels)} wheels and {len(archives)} source archives, and should be one of each"
    for path in wheels:
        yield from wheel(path, root, version)
    for path in archives:
        yield from source_archive(path, version, tracked(root))


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="with the wheel and the source archive")
    parser.add_argument("--tag", help="of the release, v and the version")
    parser.add_argument("--draft", action="store_true", help="pass what only a release needs: an address and a day")
    given = parser.parse_args()
    found = list(complaints(given.directory, ROOT, given.tag, given.draft))
    for complaint in found:
        print(complaint, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

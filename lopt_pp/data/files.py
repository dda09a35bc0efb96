"""Finds the files that `--train_file` names, and says how they are read; without an import of `datasets` and torch."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

from lopt_pp.errors import LoptError

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""How the names of compressed files end."""


def find_files(given: Sequence[str]) -> Iterator[Path]:
    """The files, and the directories of saved data sets, that `--train_file` names."""
    for name in given:
        if not name:  # Not the current directory, which is `.`.
            raise LoptError("--train_file '': expected the name of a file, which is not empty")
        matches = [name] if Path(name).exists() or not glob.has_magic(name) else _match(name)
        if not matches:
            raise LoptError(f"--train_file {name} matches no file")
        for path in map(Path, matches):
            if not path.exists():
                raise LoptError(f"--train_file {path} does not exist")
            if not path.is_dir() or is_saved(path):
                yield _check_file(path)
                continue
            found = sorted(file for file in path.rglob("*") if file.is_file() and builder_of(file))
            # As patterns and `datasets` do, it passes over copies that editors, notebooks and systems have hidden.
            files = [file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts)]
            if not files:
                raise LoptError(f"--train_file {path} is a directory without files that end in {', '.join(_BUILDERS)}")
            yield from map(_check_file, files)


def check_dataset_name(name: str) -> None:
    """Sees that `--dataset_name` is not a file, which `datasets` would look for on the hub.

    Raises:
        LoptError: it is.
    """
    if Path(name).is_file():
        raise LoptError(f"--dataset_name {name} is a file; give it as --train_file {name}")


def _match(pattern: str) -> list[str]:
    """What a pattern matches; a directory that is there, such as `run[1]` in `run[1]/*.jsonl`, is meant as it is."""
    parts = Path(pattern).parts
    number = next(number for number in range(len(parts)) if not Path(*parts[: number + 1]).exists())
    literal = [glob.escape(part) for part in parts[:number]]
    return sorted(glob.glob(str(Path(*literal, *parts[number:])), recursive=True))


def _check_file(path: Path) -> Path:
    if not path.is_file() and not path.is_dir():
        raise LoptError(f"--train_file {path} is a pipe or a device; write the rows to a file and give that")
    if path.is_file() and builder_of(path) is None:
        raise LoptError(f"--train_file {path} ends in none of {', '.join(_BUILDERS)}; convert it to one of these")
    if path.is_file() and path.stat().st_size == 0:
        raise LoptError(f"--train_file {path} is empty; give a file with a row or more")
    return path


def builder_of(path: Path) -> str | None:
    """What `datasets.load_dataset` calls the format of a file, compressed or not, by its name; None for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def is_saved(path: Path) -> bool:
    """Whether `datasets` has saved a data set, or several splits, in this directory."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()

"""The data sets of a mixture, as TRL's scripts take them: the list `datasets` of a YAML file."""

import dataclasses
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopt_pp.config.fields import check_types
from lopt_pp.errors import LoptError, shown

_BUILDERS = ("json", "csv", "parquet", "arrow")
"""What `datasets.load_dataset` takes for a `path` beside `data_files`."""


@dataclass(frozen=True)
class MixtureEntry:
    """One data set of a mixture.

    Attributes:
        path: a hub id, a local directory, file or pattern; or `json`, `csv`, `parquet` or `arrow`, with `data_files`.
        name: of the configuration.
        data_dir: of the files.
        data_files: one or more, or those of each split.
        split: of the data set; slices such as `train[:1000]` are understood.
        columns: that rows are reduced to; None keeps all.
        fraction: of the mixture that is of this data set, as in TRL: so many of its first rows are taken as let all
            data sets have their share, without a row twice.
        repeats: how many times its rows are taken; of 2.5 a half, drawn by the seed, is taken a third time.

    Source: `trl.scripts.utils.DatasetConfig` (1.16), but for `repeats`.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    split: str = "train"
    columns: list[str] | None = None
    fraction: float | None = None
    repeats: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("fraction", "repeats"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1000:
                raise LoptError(f"{name} {value}: above 0, and at most 1000")

    @property
    def local_files(self) -> list[str] | None:
        """The files, directories and patterns that it names, where they are local; None where it names a data set."""
        given = self.data_files
        if isinstance(given, dict):
            given = given.get(self.split.partition("[")[0], [])
        files = [given] if isinstance(given, str) else given
        named = self.split.partition("[")[0]
        if named != "train" and not isinstance(self.data_files, dict) and (files or Path(self.path).is_file()):
            raise LoptError(f"split {self.split}: files have the split train alone; data_files may name them by splits")
        if self.path in _BUILDERS and not Path(self.path).exists():
            if not files and self.data_dir is None:
                raise LoptError(f"path {self.path} needs data_files")
            return [os.path.join(self.data_dir or "", file) for file in files or [""]]
        if Path(self.path).is_file() or glob.has_magic(self.path):
            return [self.path]
        if Path(self.path).is_dir() and (files or self.data_dir is not None):
            return [os.path.join(self.path, self.data_dir or "", file) for file in files or [""]]
        return None


def read_entries(given: Sequence[Any]) -> tuple[MixtureEntry, ...]:
    """The data sets of a mixture.

    Raises:
        LoptError: an entry cannot be one; the text has its number, from 1.
    """
    known = {field.name for field in dataclasses.fields(MixtureEntry)}
    entries = []
    for number, values in enumerate(given, start=1):
        entry = entry_name(number, values)
        if not isinstance(values, Mapping) or not isinstance(values.get("path"), str):
            raise LoptError(f"{entry}: expected keys and values, of which `path` is needed")
        if unknown := [str(key) for key in values if key not in known]:
            raise LoptError(f"{entry}: unknown key {shown(unknown[0])}; it may have {', '.join(sorted(known))}")
        try:
            (filled,) = with_paths([values], os.path.expanduser)
            entries.append(MixtureEntry(**{key: value for key, value in filled.items() if value is not None}))
        except LoptError as error:
            raise LoptError(f"{entry}: {str(error).removeprefix('--')}") from error
    for name in ("fraction", "repeats"):
        have = [getattr(entry, name) is not None for entry in entries]
        if name == "fraction" and any(have) and not all(have):
            number = have.index(False) + 1
            raise LoptError(f"{entry_name(number, given[number - 1])}: give all entries a fraction, or none")
    if any(entry.fraction is not None for entry in entries) and any(entry.repeats is not None for entry in entries):
        raise LoptError("--datasets: give the entries either fraction or repeats")
    return tuple(entries)


def entry_name(number: int, values: Any) -> str:
    """What a message calls an entry of the mixture."""
    path = values.get("path") if isinstance(values, Mapping) else values
    return f"--datasets, entry {number} ({shown(path)})"


def with_paths(given: Sequence[Any], change: Callable[[str], str]) -> list[Any]:
    """Entries of a mixture with other paths.

    Args:
        given: the entries, as flags have them.
        change: gives another path for one of theirs, which may also be a hub id.
    """
    return [
        {key: _with_paths(key, value, change) for key, value in entry.items()} if isinstance(entry, Mapping) else entry
        for entry in given
    ]


def _with_paths(key: str, value: Any, change: Callable[[str], str]) -> Any:
    if key not in ("path", "data_dir", "data_files"):
        return value
    if isinstance(value, list):
        return [_with_paths(key, item, change) for item in value]
    if isinstance(value, dict):
        return {split: _with_paths(key, item, change) for split, item in value.items()}
    return change(value) if isinstance(value, str) else value

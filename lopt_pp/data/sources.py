"""Reads raw rows: local files and directories, data sets of the hub, and data sets that were saved to disk."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from lopt_pp.config.data import DataConfig
from lopt_pp.data.csv_files import CsvFile
from lopt_pp.data.files import builder_of, check_dataset_name, find_files, is_saved
from lopt_pp.data.json_files import JsonFile
from lopt_pp.data.raw_rows import Part, RawRows
from lopt_pp.data.table_files import TABLE_ERRORS, TableRows, open_arrow, open_parquet
from lopt_pp.data.unpacking import unpacked
from lopt_pp.errors import LoptError, first_line, renamed_in_errors


def read_rows(config: DataConfig) -> RawRows:
    """The raw rows that `config` names.

    Raises:
        LoptError: they cannot be read. That there are none is said when they are asked for.
    """
    if config.train_file:
        return read_files(config.train_file)
    source = ", ".join(filter(None, (config.dataset_name, config.dataset_config)))
    return _read_directory(config, source) or RawRows([TableRows(_load_dataset(config), source)], source)


def read_files(given: Sequence[str]) -> RawRows:
    """The rows of files, as `--train_file` takes them."""
    paths = list(find_files(given))
    source = str(paths[0])
    if len(paths) > 1:
        times = Counter(path.resolve() for path in paths)
        twice = [f"{path.name} {count} times" for path, count in times.items() if count > 1]
        source = f"{', '.join(given)} ({', '.join([f'{len(paths)} files', *twice])})"
    by_lines = all(path.suffix.lower() == ".jsonl" for path in paths)
    return RawRows([_open(path) for path in paths], source, "--train_file", by_lines)


_OPEN: dict[str, Callable[[Path, str], Part]] = {
    "json": JsonFile,
    "csv": CsvFile,
    "parquet": open_parquet,
    "arrow": open_arrow,
}


def _open(path: Path) -> Part:
    if path.is_dir():
        return TableRows(load_saved(path, "train"), str(path), is_whole=True)
    builder = builder_of(path)
    assert builder is not None
    try:
        return _OPEN[builder](unpacked(path), str(path))
    except TABLE_ERRORS as error:
        raise LoptError(
            f"--train_file {path} cannot be read: {first_line(error)}; give a valid {builder} file"
        ) from error


def _read_directory(config: DataConfig, source: str) -> RawRows | None:
    """The rows of a local directory that `--dataset_name` names; None where only `datasets` can read it.

    `datasets` says which files make which split, and the reader of `--train_file` reads them.
    """
    assert config.dataset_name is not None
    if not Path(config.dataset_name).is_dir() or is_saved(Path(config.dataset_name)):
        return None
    with _named(config), renamed_in_errors("--train_file ", ""):
        builder = datasets.load_dataset_builder(config.dataset_name, config.dataset_config)
        given = builder.config
        fixed = {name: getattr(given, name) for name in ("name", "version", "data_dir", "data_files", "description")}
        is_plain = builder.info.features is None and given == type(given)(**fixed)
        splits = {str(name): list(map(Path, files)) for name, files in (given.data_files or {}).items()}
        kinds = {builder_of(path) for paths in splits.values() for path in paths if path.exists()}
        if not is_plain or kinds != {type(builder).__module__.split(".")[-1]}:
            return None
        spec = "+".join(splits) if config.dataset_split == "all" else config.dataset_split
        raw = RawRows([_open(path) for paths in splits.values() for path in paths], source)
        sizes = raw.sizes()
        firsts: dict[str, int] = {}
        lengths: dict[str, int] = {}
        for name, paths in splits.items():
            firsts[name] = sum(lengths.values())
            lengths[name] = sum(next(sizes) for _ in paths)
        ranges = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        return raw.select(np.concatenate([firsts[r.splitname] + np.arange(r.from_, r.to) for r in ranges]))


def split_of(raw: RawRows, spec: str) -> RawRows:
    """Rows as a split, such as `train[:1000]`, which is all of them but for the slice."""
    name = spec.partition("[")[0]
    try:
        (part,) = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(raw)})
    except ValueError as error:
        raise LoptError(f"split {spec}: {first_line(error)}; such as train, or train[:1000]") from error
    return raw if (part.from_, part.to) == (0, len(raw)) else raw.select(np.arange(part.from_, part.to))


def load_saved(path: Path, split: str) -> Dataset:
    """A data set that `datasets` has saved to disk, or a split of one.

    Raises:
        LoptError: it cannot be read, or has no such split.
    """
    try:
        saved = datasets.load_from_disk(str(path))
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise LoptError(f"{path}, saved by `datasets`, cannot be read: {first_line(root_of(error))}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise LoptError(f"{path} has no split {split}, but {', '.join(saved)}; give its directory, {path}/SPLIT")
        saved = saved[split]
    return saved


def _load_dataset(config: DataConfig) -> Dataset:
    assert config.dataset_name is not None
    check_dataset_name(config.dataset_name)
    if is_saved(Path(config.dataset_name)):
        return load_saved(Path(config.dataset_name), config.dataset_split)
    with _named(config):
        return datasets.load_dataset(config.dataset_name, config.dataset_config, split=config.dataset_split)


@contextmanager
def _named(config: DataConfig) -> Iterator[None]:
    """Has errors of loading `--dataset_name` say so."""
    try:
        yield
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        given = f"--dataset_name {config.dataset_name} "
        if config.dataset_config is not None:
            given += f"--dataset_config {config.dataset_config} "
        raise LoptError(
            f"{given}--dataset_split {config.dataset_split} cannot be loaded: {first_line(root_of(error))}"
        ) from error


@contextmanager
def quiet_unless(shows: bool) -> Iterator[None]:
    """Keeps the progress bars of `datasets` to the process that shows them."""
    hide = not shows and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def root_of(error: BaseException) -> BaseException:
    """The error at the bottom of a chain of causes: `datasets` wraps what went wrong in general words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

"""Reads the training data and tokenizes it, leaving out the rows that cannot be trained on."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from lopt_pp.data import formats
from lopt_pp.data.config import DataConfig
from lopt_pp.data.formats import IGNORE_INDEX, EncodedRow, RowEncoder
from lopt_pp.errors import LoptError, first_line

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "num_targets": Value("int32"),
    }
)


class TokenizedRows:
    """The rows to train on, in the order of the data set; their tokens stay on disk until a row is asked for.

    Attributes:
        source: the file or data set that they come from, for messages.
        dropped: how many rows were left out, by reason; reasons without rows are absent.
        lengths: int64 [rows], the number of tokens of each row.
        num_targets: int64 [rows], the number of predicted tokens with a loss: of labels other than -100, after the
            first, which nothing predicts.
    """

    def __init__(self, dataset: Dataset, source: str, dropped: Mapping[str, int]) -> None:
        """Takes a data set with the columns `input_ids`, `labels`, `length` and `num_targets`; see `load_rows`."""
        self._dataset = dataset
        self.source = source
        self.dropped = dict(dropped)
        self.lengths = _column(dataset, "length")
        self.num_targets = _column(dataset, "num_targets")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> EncodedRow:
        row = self._dataset[index]
        return EncodedRow(row["input_ids"], row["labels"])

    def select(self, numbers: np.ndarray, others: str) -> "TokenizedRows":
        """Some of the rows, in the order given; the rest counts as left out.

        Args:
            numbers: of the rows.
            others: why the rest is left out, for `dropped`.
        """
        dropped = self.dropped | {others: len(self) - len(numbers)}
        return TokenizedRows(self._dataset.select(numbers), self.source, dropped)

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of all token ids and labels in order: processes with other data have another one."""
        sha = hashlib.sha256()
        for table in self._dataset.with_format("arrow").iter(batch_size=1000):
            for name in ("input_ids", "labels"):
                column = table[name].combine_chunks()
                sha.update(column.value_lengths().to_numpy().tobytes())
                sha.update(column.flatten().to_numpy().tobytes())
        return sha.hexdigest()

    def summary(self) -> str:
        """One line for the log, such as `12 rows of train.jsonl: 10 used, 2 left out (2 without a target token)`."""
        total = len(self) + sum(self.dropped.values())
        line = f"{total} rows of {self.source}: {len(self)} used"
        if self.dropped:
            line += f", {total - len(self)} left out ({_reasons(self.dropped)})"
        return line


def load_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TokenizedRows:
    """Reads the rows that `config` names and tokenizes them (see `RowEncoder` for the shapes of rows).

    Left out are rows of more than `max_length` tokens and rows without a target token. The tokens are cached on disk by
    `datasets`, which moves a finished file into place, so the processes of a run may all call this at once.

    Raises:
        LoptError: the data cannot be read, a row is malformed (the text has its number, from 1), or no row is left.
    """
    source = config.train_file or ", ".join(filter(None, (config.dataset_name, config.dataset_config)))
    with _one_progress_bar():
        raw = _load_file(Path(config.train_file)) if config.train_file else _load_dataset(config)
        if len(raw) == 0:
            raise LoptError(f"{source} has no rows; give data with a row or more")
        encoded = _encode(raw, RowEncoder(tokenizer), source)

    lengths, num_targets = _column(encoded, "length"), _column(encoded, "num_targets")
    too_long = lengths > config.max_length
    untargeted = ~too_long & (num_targets == 0)
    counts = {
        f"longer than --max_length {config.max_length}": int(too_long.sum()),
        "without a target token": int(untargeted.sum()),
    }
    dropped = {reason: count for reason, count in counts.items() if count}
    used = np.flatnonzero(~too_long & ~untargeted)
    if len(used) == 0:
        advice = []
        if too_long.any():
            advice.append(f"the shortest of the long ones has {lengths[too_long].min()} tokens: raise --max_length")
        if untargeted.any():
            advice.append("a target token is one of an answer: check the answers, or the role `assistant` of messages")
        raise LoptError(
            f"none of the {len(raw)} rows of {source} can be used ({_reasons(dropped)}); {'; '.join(advice)}"
        )
    return TokenizedRows(encoded.select(used), source, dropped)


def _load_file(path: Path) -> Dataset:
    if not path.is_file():
        what = "is a directory; give it as --dataset_name, or one of its files" if path.is_dir() else "does not exist"
        raise LoptError(f"--train_file {path} {what}")
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise LoptError(f"--train_file {path} ends in none of {', '.join(_BUILDERS)}; convert it to one of these")
    size = path.stat().st_size
    if size == 0:
        raise LoptError(f"--train_file {path} is empty; give a file with a row or more")
    try:
        options: dict[str, Any] = {}
        if builder == "json":
            # `datasets` takes the columns from the first chunk and fails at a key that first appears in a later one.
            # It would also take rows with the columns of an agent's trace for such a trace, whatever they hold.
            options = {"chunksize": max(size, 10 << 20), "parse_agent_traces": False}
        elif builder == "csv":
            # All columns are text: an answer "007" or "None" is neither a number nor an absent value.
            columns = pd.read_csv(path, nrows=0).columns
            options = {"features": Features({column: Value("string") for column in columns})}
            options |= {"keep_default_na": False, "na_values": [""]}
        return datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise LoptError(
            f"--train_file {path} cannot be read: {first_line(_root(error))}; give a valid {builder} file with a row "
            f"or more"
        ) from error


def _load_dataset(config: DataConfig) -> Dataset:
    try:
        return datasets.load_dataset(config.dataset_name, config.dataset_config, split=config.dataset_split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        given = f"--dataset_name {config.dataset_name} "
        if config.dataset_config is not None:
            given += f"--dataset_config {config.dataset_config} "
        raise LoptError(
            f"{given}--dataset_split {config.dataset_split} cannot be loaded: {first_line(_root(error))}"
        ) from error


def _encode(raw: Dataset, encoder: RowEncoder, source: str) -> Dataset:
    """Encodes all rows, with their lengths and numbers of targets, which need no reading of tokens afterwards."""

    def encode(batch: Mapping[str, list[Any]], indices: list[int], code: str) -> dict[str, list[Any]]:
        rows = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            try:
                rows.append(encoder(dict(zip(batch, values, strict=True))))
            except LoptError as error:
                raise LoptError(f"row {index + 1} of {source}: {error}") from error
        return {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "length": [len(row.input_ids) for row in rows],
            "num_targets": [sum(label != IGNORE_INDEX for label in row.labels[1:]) for row in rows],
        }

    # The cache goes by the arguments of `encode`, tokenizer included, but would not see a change of the encoder's code.
    code = hashlib.sha256(Path(formats.__file__).read_bytes()).hexdigest()
    return raw.map(
        encode,
        batched=True,
        with_indices=True,
        fn_kwargs={"code": code},
        remove_columns=raw.column_names,
        features=_FEATURES,
        desc="Tokenizing",
    )


@contextmanager
def _one_progress_bar() -> Iterator[None]:
    """Keeps the progress bars of `datasets` to the process of rank 0."""
    hide = os.environ.get("RANK", "0") != "0" and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return dataset.with_format("numpy")[name][:].astype(np.int64)


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items())


def _root(error: BaseException) -> BaseException:
    """The error at the bottom of a chain of causes: `datasets` wraps what went wrong in general words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error

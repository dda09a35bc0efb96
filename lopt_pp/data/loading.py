"""Reads the training data and tokenizes it, leaving out the rows that cannot be trained on."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopt_pp.config.data import DataConfig
from lopt_pp.data import encoding, formats
from lopt_pp.data.dataset import PackedRows, Rows, TokenizedRows, column, listed
from lopt_pp.data.encoding import Note, RowEncoder
from lopt_pp.data.presets import find_preset, find_reader
from lopt_pp.data.sources import Table, quiet_unless, read_rows
from lopt_pp.data.streaming import StreamedRows
from lopt_pp.errors import LoptError, first_line
from lopt_pp.util.compat_datasets import signals_as_usual_in_workers

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "length": Value("int32"),
        "num_targets": Value("int32"),
        "notes": Value("int8"),
    }
)

_CHANGES = {
    Note.TAIL_CUT: "without the messages after their last answer",
    Note.ONLY_LAST_ANSWER: "with a loss on their last answer only, as the chat template renders earlier ones otherwise",
}

_ROWS_PER_PROCESS = 2000
"""Fewer are not worth another process for."""


def with_chat_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template of `--chat_template_path`, or of a preset where it has none of its own.

    Raises:
        LoptError: there is no such template, or it uses special tokens that the tokenizer lacks.
    """
    path = config.chat_template_path
    if path is None:
        preset = find_preset(config.dataset_mapping)
        if preset is not None and preset.chat_template is not None and not tokenizer.chat_template:
            tokenizer.chat_template = preset.chat_template
        return tokenizer
    added: list[str] = []
    if Path(path).is_file():
        template = Path(path).read_text(encoding="utf-8")
    else:
        try:
            other = AutoTokenizer.from_pretrained(path)
            template, added = other.get_chat_template(), list(other.get_added_vocab())
        except (OSError, ValueError, KeyError) as error:
            raise LoptError(
                f"--chat_template_path {path} is neither a file nor a tokenizer with a chat template: "
                f"{first_line(error)}"
            ) from error
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in added if token in template and token not in vocabulary]
    if missing:
        raise LoptError(
            f"--chat_template_path {path} uses tokens that the model's tokenizer lacks: {', '.join(missing)}; give a "
            f"template that does without"
        )
    tokenizer.chat_template = template
    return tokenizer


def load_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Reads the rows that `config` names and tokenizes them (see `read_row` for the formats of rows).

    Left out are rows of more than `max_length` tokens and rows without a target token. The tokens are cached on disk by
    `datasets`, which moves a finished file into place, so the processes of a run may all call this at once; where one
    of them is first, the others find what it made. With `streaming` nothing is tokenized but a sample.

    Raises:
        LoptError: the data cannot be read, a row is malformed (the text has its number, from 1), or no row is left.
    """
    reader, version = find_reader(config.dataset_mapping, config.dataset_text_field)
    encoder = RowEncoder(tokenizer, reader, config.assistant_only_loss, config.completion_only_loss)
    with quiet_unless(os.environ.get("RANK", "0") == "0"):
        raw = read_rows(config)
        if config.streaming:
            return StreamedRows(raw, encoder, config.max_length, config.packing)
        assert isinstance(raw, Table)
        encoded = _encode(raw, encoder, config.dataset_num_proc, version)
        rows = _usable(encoded, raw.source, config.max_length)
        return PackedRows(rows, config.max_length) if config.packing else rows


def _usable(encoded: Dataset, source: str, max_length: int) -> TokenizedRows:
    """The rows that can be trained on."""
    lengths, num_targets, notes = (column(encoded, name) for name in ("length", "num_targets", "notes"))
    unwanted, too_long = lengths < 0, lengths > max_length
    untargeted = ~unwanted & ~too_long & (num_targets == 0)
    counts = {
        f"longer than --max_length {max_length}": int(too_long.sum()),
        "without a target token": int(untargeted.sum()),
        "by --dataset_mapping": int(unwanted.sum()),
    }
    dropped = {reason: count for reason, count in counts.items() if count}
    used = np.flatnonzero(~unwanted & ~too_long & ~untargeted)
    if len(used) == 0:
        advice = []
        if too_long.any():
            advice.append(f"the shortest of the long ones has {lengths[too_long].min()} tokens: raise --max_length")
        if untargeted.any():
            advice.append("a target token is one of an answer: check the answers, or the role `assistant` of messages")
        if unwanted.all():
            advice.append("it returned None for each of them")
        raise LoptError(
            f"none of the {len(lengths)} rows of {source} can be used ({listed(dropped)}); {'; '.join(advice)}"
        )
    changed = {change: int((notes[used] & note > 0).sum()) for note, change in _CHANGES.items()}
    changed = {change: count for change, count in changed.items() if count}
    return TokenizedRows(encoded.select(used), source, dropped, changed)


def _encode(raw: Table, encoder: RowEncoder, num_proc: int | None, version: str) -> Dataset:
    """Encodes all rows, with their lengths and numbers of targets, which need no reading of tokens afterwards.

    Args:
        raw: the rows.
        encoder: of rows.
        num_proc: processes to encode in; None is as many as there are cores, if rows are many.
        version: a text that changes with the user's code.
    """
    name: Callable[[int], str] = raw.name

    def encode(batch: Mapping[str, list[Any]], indices: list[int], code: str) -> dict[str, list[Any]]:
        rows = []
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            try:
                rows.append(encoder(dict(zip(batch, values, strict=True))))
            except LoptError as error:
                raise LoptError(f"{name(index)}: {error}") from error
        return {
            "input_ids": [row.input_ids if row else [] for row in rows],
            "labels": [row.labels if row else [] for row in rows],
            "length": [len(row.input_ids) if row else -1 for row in rows],  # Unlike a row that is empty.
            "num_targets": [row.num_targets if row else 0 for row in rows],
            "notes": [int(row.notes) if row else 0 for row in rows],
        }

    # The cache goes by the arguments of `encode`, tokenizer included, but would not see a change of the encoder's code.
    sources = b"".join(Path(module.__file__ or "").read_bytes() for module in (encoding, formats))
    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, len(raw) // _ROWS_PER_PROCESS)
    with signals_as_usual_in_workers():
        return raw.dataset.map(
            encode,
            batched=True,
            with_indices=True,
            num_proc=num_proc if num_proc > 1 else None,
            fn_kwargs={"code": hashlib.sha256(sources + version.encode()).hexdigest()},
            remove_columns=raw.dataset.column_names,
            features=_FEATURES,
            desc="Tokenizing",
        )

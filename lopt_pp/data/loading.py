"""Reads the training data and tokenizes it, leaving out the rows that cannot be trained on."""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopt_pp.config.data import DataConfig
from lopt_pp.data.cache import cache_errors_named, cache_folder
from lopt_pp.data.dataset import NoUsableRowsError, Rows, TokenizedRows, column, listed
from lopt_pp.data.dates import Encoder, dated
from lopt_pp.data.encoded import CHANGES, Note
from lopt_pp.data.encoding import RowEncoder
from lopt_pp.data.in_memory import NO_SOURCE, GivenSource, formatted
from lopt_pp.data.limits import RowLimits
from lopt_pp.data.mixture import read_mixture
from lopt_pp.data.packed_rows import PackedRows, SplitRows
from lopt_pp.data.presets import find_preset, find_reader
from lopt_pp.data.raw_rows import RawRows
from lopt_pp.data.sources import quiet_unless, read_rows
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
        "unusable": Value("string"),
        "unused": Value("string"),
    }
)

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
        template = _read_template(Path(path))
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
            f"template that does without, or the tokens (--added_tokens)"
        )
    tokenizer.chat_template = template
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        template = path.read_text(encoding="utf-8-sig")  # A byte-order mark would open each conversation.
    except (OSError, ValueError) as error:
        raise LoptError(f"--chat_template_path {path} cannot be read as UTF-8: {first_line(error)}") from error
    if not template.strip():
        raise LoptError(f"--chat_template_path {path} is empty; give a Jinja template")
    return template


def load_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: RowLimits | None = None,
    day: date | None = None,
    seed: int = 0,
    given: GivenSource = NO_SOURCE,
) -> Rows:
    """Reads the rows that `config` names and tokenizes them (see `read_row` for the formats of rows).

    Left out are rows without a target token, and those of more than `max_length` tokens where they are not split. The
    tokens are cached on disk by `datasets`, which moves a finished file into place, so the processes of a run may all
    call this at once; where one of them is first, the others find what it made. With `streaming` nothing is tokenized
    but a sample.

    Args:
        config: names the rows.
        tokenizer: of the model.
        limits: what the model can take of a row.
        day: that the chat template prints, if it prints one; None is today.
        seed: of the run, for what is drawn of the rows.
        given: what a script says of the rows, in place of what `config` says.

    Raises:
        LoptError: the data cannot be read, a row is malformed or not for the model, as `limits` has it (the text has
            its number, from 1), or no row is left.
    """
    if config.streaming:
        raw, encode, limits = _raw_rows(config, tokenizer, limits, day, given, seed)
        with quiet_unless(os.environ.get("RANK", "0") == "0"):
            strategy = config.packing_strategy if config.packing else None
            return StreamedRows(raw, encode, config.max_length, strategy, limits)
    return packed(load_unpacked(config, tokenizer, limits, day, given, seed), config, seed)


def load_unpacked(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: RowLimits | None = None,
    day: date | None = None,
    given: GivenSource = NO_SOURCE,
    seed: int = 0,
) -> TokenizedRows:
    """What `load_rows` does, but for packing: rows that will be split are whole yet. The arguments are the same."""
    raw, encode, limits = _raw_rows(config, tokenizer, limits, day, given, seed)
    _, version = find_reader(config.dataset_mapping, config.dataset_text_field)
    with quiet_unless(os.environ.get("RANK", "0") == "0"):
        once, which = raw.once()  # Rows that come several times are tokenized once.
        encoded = _encode(once, encode, config.dataset_num_proc, version)
        encoded = encoded if which is None else encoded.select(which)
        return _usable(encoded, raw.source, config, raw.name, limits)


def packed(rows: TokenizedRows, config: DataConfig, seed: int) -> Rows:
    """Rows to train on, packed where `config` says so."""
    if not config.packing:
        return rows
    shuffled_by = seed if config.shuffle_dataset else None
    return PackedRows(rows, config.max_length, config.packing_strategy, shuffled_by)


def to_evaluate_on(rows: TokenizedRows, config: DataConfig) -> TokenizedRows:
    """Rows as they are evaluated on: not packed, which changes no loss; but split where the training rows are."""
    return SplitRows(rows, config.max_length) if config.splits_rows else rows


def _raw_rows(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: RowLimits | None,
    day: date | None,
    given: GivenSource,
    seed: int,
) -> tuple[RawRows, Encoder, RowLimits | None]:
    """The rows as they are, what makes tokens of them, and what the model can take of one of them."""
    reader, _ = find_reader(config.dataset_mapping, config.dataset_text_field)
    if given.formatting_func is not None:
        reader = formatted(given.formatting_func)
    encoder = RowEncoder(
        tokenizer,
        reader,
        config.assistant_only_loss,
        config.completion_only_loss,
        config.allow_no_stop_token,
        config.truncation,
    )
    if limits is not None and config.splits_rows:
        limits = limits.for_pieces(config.max_length)
    with quiet_unless(os.environ.get("RANK", "0") == "0"):
        raw = given.rows
        if raw is None:
            raw = read_mixture(config.mixture, seed) if config.datasets else read_rows(config)
        return raw, dated(encoder, tokenizer, day), limits


def _usable(
    encoded: Dataset, source: str, config: DataConfig, name: Callable[[int], str], limits: RowLimits | None
) -> TokenizedRows:
    """The rows that can be trained on."""
    max_length = config.max_length
    lengths, num_targets, notes = (column(encoded, name) for name in ("length", "num_targets", "notes"))
    reasons = encoded.with_format("numpy")["unusable"][:]
    unwanted, unusable = lengths < 0, reasons != ""
    too_long = ~unusable & (lengths > max_length) & (not config.splits_rows)
    untargeted = ~unwanted & ~unusable & ~too_long & (num_targets == 0)
    counts = {
        f"longer than --max_length {max_length}": int(too_long.sum()),
        "without a target token": int(untargeted.sum()),
        "by --dataset_mapping": int(unwanted.sum()),
        **Counter(sorted(reasons[unusable].tolist())),
    }
    dropped = {reason: count for reason, count in counts.items() if count}
    used = np.flatnonzero(~unwanted & ~unusable & ~too_long & ~untargeted)
    if len(used) == 0:
        advice = []
        if too_long.any():
            advice.append(f"the shortest of the long ones has {lengths[too_long].min()} tokens: raise --max_length")
        if unusable.any():
            advice.append("docs/data.md says what an answer needs to count")
        cut = untargeted & (notes & Note.TRUNCATED > 0)
        if cut.any():
            other = ", or give --truncation_mode keep_end" if config.truncation_mode == "keep_start" else ""
            advice.append(f"--truncation_mode has cut the answers away: raise --max_length{other}")
        if (untargeted & ~cut).any():
            advice.append("a target token is one of an answer: check the answers, or the role `assistant` of messages")
        if unwanted.all():
            advice.append("it returned None for each of them")
        said = f"none of the {len(lengths)} rows of {source} can be used ({listed(dropped)}); {'; '.join(advice)}"
        raise NoUsableRowsError(said, source)
    changed = {change: int((notes[used] & note > 0).sum()) for note, change in CHANGES.items()}
    changed = {change: count for change, count in changed.items() if count}
    unused = dict.fromkeys(name for names in encoded.unique("unused") for name in json.loads(names))
    rows = encoded.select(used)
    if limits is not None:
        limits.check_all(rows, lengths[used], lambda place: name(int(used[place])))
        if os.environ.get("RANK", "0") == "0":
            limits.warn_of(min(int(lengths[used].max()), max_length))
    return TokenizedRows(rows, source, dropped, changed, tuple(unused))


def _encode(raw: RawRows, encoder: Encoder, num_proc: int | None, version: str) -> Dataset:
    """Encodes all rows, with their lengths and numbers of targets, which need no reading of tokens afterwards.

    Args:
        raw: the rows.
        encoder: of rows.
        num_proc: processes to encode in; None is as many as there are cores, if rows are many.
        version: a text that changes with the user's code.
    """
    # The cache goes by the content of the files, the encoder (the tokenizer included) and the code of this room.
    code = b"".join(module.read_bytes() for module in sorted(Path(__file__).parent.glob("*.py")))
    key = Hasher.hash([raw.digest, encoder, hashlib.sha256(code).hexdigest(), version])
    path = cache_folder() / f"tokens-{key}.arrow"
    if (cached := _find_cached(path)) is not None:
        return cached
    parts = raw.parts

    def encode(batch: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        rows = []
        places = zip(*(batch[name] for name in ("part", "number", "start", "stop")), strict=True)
        for part, group in itertools.groupby(places, lambda place: place[0]):
            _, numbers, starts, stops = zip(*group, strict=True)
            values = parts[part].read(starts, stops)
            for number, start in zip(numbers, starts, strict=True):
                try:
                    rows.append(encoder(next(values)))
                except LoptError as error:
                    raise LoptError(f"{parts[part].row_name(number, start)}: {error}") from error
        return {
            "input_ids": [row.input_ids if row else [] for row in rows],
            "labels": [row.labels if row else [] for row in rows],
            "length": [len(row.input_ids) if row else -1 for row in rows],  # Unlike a row that is empty.
            "num_targets": [row.num_targets if row else 0 for row in rows],
            "notes": [int(row.notes) if row else 0 for row in rows],
            "unusable": [row.unusable if row else "" for row in rows],
            "unused": [json.dumps(row.unused if row else ()) for row in rows],
        }

    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, len(raw) // _ROWS_PER_PROCESS)
    table = raw.table()
    with cache_errors_named(), signals_as_usual_in_workers():
        return table.map(
            encode,
            batched=True,
            num_proc=num_proc if num_proc > 1 else None,
            remove_columns=table.column_names,
            features=_FEATURES,
            cache_file_name=str(path),
            new_fingerprint=key,
            desc="Tokenizing",
        )


def _find_cached(path: Path) -> Dataset | None:
    """What `Dataset.map` has made at `path`, in one file or in one for each of its processes, if all are there."""
    if not datasets.is_caching_enabled():
        return None
    files = [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}_*_of_*.arrow"))
    if not files or (files[0] != path and len(files) != int(files[0].stem.rsplit("_", 1)[1])):
        return None
    return concatenate_datasets([Dataset.from_file(str(file)) for file in files])

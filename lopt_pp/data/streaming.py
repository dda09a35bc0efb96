"""Rows that are tokenized when their step comes."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from lopt_pp.config.data import PackingStrategy
from lopt_pp.data.dataset import NoUsableRowsError, Pack, UnusableRowsError, listed, summarize
from lopt_pp.data.dates import Encoder
from lopt_pp.data.encoded import CHANGES, EncodedRow, Note
from lopt_pp.data.formats import IGNORE_INDEX
from lopt_pp.data.limits import RowLimits
from lopt_pp.data.packing import Packs, pack
from lopt_pp.data.raw_rows import RawRows
from lopt_pp.errors import LoptError

_SHOWN = 3
"""Further rows that an error names."""

_SAMPLE = 256
"""Rows that are tokenized before the first step: they tell processes with other data apart, and how long rows are."""


@dataclass(frozen=True)
class _Encoded:
    """An encoded row in little memory: int32 arrays, since steps are kept for a while; or why it is left out."""

    input_ids: np.ndarray
    labels: np.ndarray
    num_targets: int
    unusable: str = ""
    unused: tuple[str, ...] = ()
    is_cut: bool = False

    def piece(self, start: int, stop: int) -> "_Encoded":
        """Tokens of it as a row of their own."""
        return _encoded(self.input_ids[start:stop], self.labels[start:stop])

    def read(self) -> EncodedRow:
        return EncodedRow(self.input_ids.tolist(), self.labels.tolist())


class StreamedRows:
    """Raw rows, read as the order draws them and tokenized then, one step ahead, in a thread.

    Which rows can be used is not known before. The order is over all of them, and those that cannot be used are left
    out of their step, so that a step is a function of its own rows alone. With packing, the rows of a step are packed
    together; so many are drawn for it as fill its packs on average, by a sample.

    Args:
        raw: the rows.
        encoder: makes tokens of them.
        max_length: longest row that is used, or that rows are split into, and the length of packs, in tokens.
        strategy: how the rows of a step are packed; None where they are not.
        limits: what the model can take of a row; None where it does not matter.

    Raises:
        LoptError: no row of the sample can be used, or some are malformed or not for the model.
    """

    def __init__(
        self,
        raw: RawRows,
        encoder: Encoder,
        max_length: int,
        strategy: PackingStrategy | None,
        limits: RowLimits | None = None,
    ) -> None:
        self._raw = raw
        self._encoder = encoder
        self._max_length = max_length
        self._strategy = strategy
        self._limits = limits
        self._dropped: dict[int, str] = {}
        self._cut: set[int] = set()
        self._unused: dict[str, None] = {}
        self._fetched = np.zeros(len(raw), dtype=bool)
        # One thread encodes all rows: tokenizers do not bear two at once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._begun: dict[bytes, Future[tuple[list[_Encoded], list[Pack]]]] = {}
        self._sampled = np.unique(np.linspace(0, len(raw) - 1, _SAMPLE).astype(np.int64))
        self._sample = self._encode_all(self._sampled)
        self._unused.update(dict.fromkeys(column for row in self._sample for column in row.unused))
        lengths = [len(row.input_ids) for row in self._sample if not row.unusable]
        if not lengths:
            reasons = Counter(row.unusable for row in self._sample)
            raise NoUsableRowsError(
                f"none of {len(self._sampled)} rows of {raw.source}, from its first to its last, can be used "
                f"({listed(reasons)}); check --max_length and the answers",
                raw.source,
            )
        if limits is not None and os.environ.get("RANK", "0") == "0":
            limits.warn_of(min(max(lengths), max_length))
        self.rows_per_pack = self._rows_per_pack(float(np.mean(lengths)))

    def _rows_per_pack(self, mean_length: float) -> float:
        if self._strategy is None:
            return 1.0
        filling = self._max_length / mean_length
        return filling if self._splits else max(1.0, float(int(filling)))

    @property
    def _splits(self) -> bool:
        return self._strategy in ("bfd_split", "wrapped")

    def __len__(self) -> int:
        return len(self._raw)

    @property
    def source(self) -> str:
        """The files or the data set that the rows come from, for messages."""
        return self._raw.source

    @property
    def files_digest(self) -> str | None:
        """In hex, of the content of the files, where they were named: `digest` is of few of the rows."""
        return self._raw.digest if self._raw.flag else None

    @property
    def lengths(self) -> np.ndarray:
        raise LoptError("--streaming leaves the lengths of rows unknown until their step")

    def fetch(self, numbers: np.ndarray) -> list[Pack]:
        begun = self._begun.pop(numbers.tobytes(), None) or self._thread.submit(self._make, numbers)
        encoded, packs = begun.result()
        self._fetched[numbers] = True
        for number, row in zip(numbers.tolist(), encoded, strict=True):
            self._unused.update(dict.fromkeys(row.unused))
            if row.unusable:
                self._dropped[number] = row.unusable
            elif row.is_cut:
                self._cut.add(number)
        return packs

    def prefetch(self, numbers: np.ndarray) -> None:
        key = numbers.tobytes()
        if key not in self._begun:
            self._begun[key] = self._thread.submit(self._make, numbers)

    def left_out(self, numbers: np.ndarray) -> str:
        gone = [number for number in numbers.tolist() if number in self._dropped]
        named = [f"{self._raw.name(number)} is {_as_fault(self._dropped[number])}" for number in gone[:_SHOWN]]
        more = [f"{len(gone) - _SHOWN} more are left out"] if len(gone) > _SHOWN else []
        return ", ".join([*named, *more])

    def _make(self, numbers: np.ndarray) -> tuple[list[_Encoded], list[Pack]]:
        """Encodes the rows of a step, and packs those that can be used."""
        encoded = self._encode_all(numbers)
        usable = [row for row in encoded if not row.unusable]
        if self._strategy is None:
            return encoded, [_pack([row]) for row in usable]
        lengths = np.array([len(row.input_ids) for row in usable], dtype=np.int64)
        return encoded, self._packs(usable, pack(lengths, self._max_length, self._strategy))

    def _packs(self, usable: Sequence[_Encoded], packs: Packs) -> list[Pack]:
        made = []
        for number in range(len(packs)):
            pieces = [usable[row].piece(start, stop) for row, start, stop in packs[number]]
            made.append(_pack([_joined(pieces)] if self._strategy == "wrapped" else pieces))
        return made

    def _encode_all(self, numbers: np.ndarray) -> list[_Encoded]:
        encoded: list[_Encoded] = []
        errors: dict[int, LoptError] = {}
        for number in numbers.tolist():
            try:
                encoded.append(self._encode(number))
            except LoptError as error:
                errors[number] = error
        if errors:
            raise _unusable(self._raw, errors)
        return encoded

    def _encode(self, number: int) -> _Encoded:
        try:
            row = self._encoder(self._raw[number])
        except (LoptError, OSError) as error:
            raise LoptError(f"{self._raw.name(number)}: {error}") from error
        unusable = ""
        if row is None:
            row, unusable = EncodedRow([], []), "by --dataset_mapping"
        elif row.unusable:
            unusable = row.unusable
        elif len(row.input_ids) > self._max_length and not self._splits:
            unusable = f"longer than --max_length {self._max_length}"
        elif row.num_targets == 0:
            unusable = "without a target token"
        input_ids, labels = np.array(row.input_ids, np.int32), np.array(row.labels, np.int32)
        is_cut = bool(row.notes & Note.TRUNCATED)
        encoded = _Encoded(input_ids, labels, row.num_targets, unusable, row.unused, is_cut)
        if self._limits is not None and not unusable:
            self._limits.check(self._raw.name(number), encoded.input_ids, encoded.labels)
        return encoded

    @cached_property
    def digest(self) -> str:
        """The SHA-256, in hex, of the rows' outline (of JSONL: the lengths of its lines) and the tokens of a sample."""
        return self.digest_without(())

    def digest_without(self, numbers: Sequence[int]) -> str:
        numbers = [number for number in numbers if number < len(self)]  # A manifest may be of other rows.
        numbers = self._raw.the_same(numbers).tolist()
        sha = hashlib.sha256(self._raw.outline_without(numbers))
        for number, row in zip(self._sampled.tolist(), self._sample, strict=True):
            if number not in numbers:
                sha.update(row.unusable.encode() + row.input_ids.tobytes() + row.labels.tobytes())
        return sha.hexdigest()

    def summary(self) -> str:
        """How many rows there are, and what has become of those whose step has come."""
        line = f"{len(self)} rows of {self._raw.source}, tokenized as their step comes"
        num_fetched = int(self._fetched.sum())
        if num_fetched == 0:
            sampled = Counter(row.unusable for row in self._sample if row.unusable)
            cut = sum(row.is_cut and not row.unusable for row in self._sample)
            return f"{line}; of a sample, " + summarize(
                "it", len(self._sample) - sampled.total(), sampled, _cut(cut), tuple(self._unused)
            )
        reasons = Counter(self._dropped.values())
        used, unused = num_fetched - reasons.total(), tuple(self._unused)
        return f"{line}; so far, " + summarize("it", used, reasons, _cut(len(self._cut)), unused)


def _cut(number: int) -> dict[str, int]:
    return {CHANGES[Note.TRUNCATED]: number} if number else {}


def _unusable(raw: RawRows, errors: Mapping[int, LoptError]) -> UnusableRowsError:
    """The first error, and which other rows have one."""
    (_, first), *others = errors.items()
    message = str(first)
    if others:
        names = ", ".join(raw.name(number) for number, _ in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        message += f"; nor can these be used: {names}{more}"
    return UnusableRowsError(message, list(errors))


def _as_fault(reason: str) -> str:
    """Why a row is left out, behind `row 3 is`."""
    return reason if reason.startswith(("longer", "without")) else f"left out ({reason})"


def _encoded(input_ids: np.ndarray, labels: np.ndarray) -> _Encoded:
    return _Encoded(input_ids, labels, int((labels[1:] != IGNORE_INDEX).sum()))


def _joined(rows: Sequence[_Encoded]) -> _Encoded:
    """Rows as one, one behind the other."""
    return _encoded(np.concatenate([row.input_ids for row in rows]), np.concatenate([row.labels for row in rows]))


def _pack(rows: list[_Encoded]) -> Pack:
    num_tokens = sum(len(row.input_ids) for row in rows)
    return Pack(num_tokens, sum(row.num_targets for row in rows), partial(_read, rows))


def _read(rows: list[_Encoded]) -> list[EncodedRow]:
    return [row.read() for row in rows]

"""What a checkpoint holds, as its manifest says it, and which checkpoints there are.

All that is read is checked before it is used: a manifest against its own checksum, a part against the manifest's.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lopt_pp.checkpoint.output_dir import MANIFEST_FILE
from lopt_pp.errors import LoptError, first_line, shown
from lopt_pp.model.dtypes import dtype_of
from lopt_pp.model.partition import BlockSpec
from lopt_pp.util.files import write_text

_FORMAT = 2
"""Since 2, what is in `run` has identifiers for names; before, it had the words of the messages."""

TRAIN_ROWS = "train_rows_sha256"
"""In a manifest's `run`: of rows that are streamed, a sample and what can be told of all without reading them."""

_UNUSABLE_ROWS = "unusable_rows"
"""In a manifest's `run`; see `note_unusable_rows`."""

_NAMES_OF_FORMAT_1 = {
    "the training rows (sha256)": "train_rows_sha256",
    "the evaluation rows (sha256)": "evaluation_rows_sha256",
    "the model's config": "model_config",
    "the rows of a step": "rows_per_step",
    "the rows that are grouped by length": "rows_grouped_by_length",
    "the dtype of the weights": "parameter_dtype",
    "the number of steps": "num_steps",
}
"""Today's names by those; flags had their dashes."""


class DamagedError(LoptError):
    """A checkpoint is not what was written: a file is missing, cut short or altered."""


@dataclass(frozen=True)
class Part:
    """A stage's file.

    Attributes:
        size: in bytes.
        sha256: in hex.
        dtype: that the pretrained model has most of the stage's parameters in; None where a manifest is older.
        other_dtypes: of the others, by name.
    """

    size: int
    sha256: str
    dtype: torch.dtype | None = None
    other_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    def dtypes_of(self, names: Iterable[str]) -> dict[str, torch.dtype]:
        """The pretrained model's dtype of each parameter of these names; nothing where the manifest does not say it."""
        if self.dtype is None:
            return {}
        return {name: self.other_dtypes.get(name, self.dtype) for name in names}


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        directory: of the checkpoint.
        step: the optimizer steps that every stage has done.
        specs: of the stages.
        run: what the run's result depends on, by the names of `lopt_pp.checkpoint.compatibility`.
        parts: of the stages, in order.
        metrics: of the model on the run's held-out rows, by name; nothing where they were not measured.
        run_id: of the run that wrote it; None where a version did that whose runs had none.
        committed: when it was complete, in seconds since 1970; None likewise. Of two checkpoints of a run the later one
            has the greater number, whatever the clocks of the machines say.
    """

    directory: Path
    step: int
    specs: tuple[BlockSpec, ...]
    run: dict[str, Any]
    parts: tuple[Part, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    run_id: str | None = None
    committed: float | None = None

    @property
    def eval_loss(self) -> float | None:
        """Of the model on the only set of held-out rows; None where it was not measured."""
        return self.metrics.get("eval_loss")

    @property
    def unusable_rows(self) -> list[int]:
        """Rows that the next step could not be made of, from 0; the digest of the training rows is without them."""
        rows = self.run.get(_UNUSABLE_ROWS, [])
        return rows if isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) else []

    def path(self, stage: int) -> Path:
        return self.directory / part_name(stage, len(self.specs))

    def check_part(self, stage: int) -> None:
        """Compares a stage's file with the manifest.

        Raises:
            DamagedError: it is missing, cut short or altered.
            LoptError: it may not be read.
        """
        path, part = self.path(stage), self.parts[stage]
        try:
            size = path.stat().st_size
            if size != part.size:
                raise DamagedError(f"{path} has {size} bytes, not the {part.size} of the manifest; it was cut short")
            if file_sha256(path) != part.sha256:
                raise DamagedError(f"{path} is not what was written: its checksum differs from the manifest's")
        except OSError as error:
            raise _unreadable(error, f"{path} cannot be read: {error.strerror}") from error

    def read_part(self, stage: int, prefix: str = "") -> dict[str, torch.Tensor]:
        """A stage's tensors, on the CPU: those whose names begin with `prefix`.

        Raises:
            DamagedError: the file is not a safetensors file.
        """
        try:
            with safe_open(self.path(stage), framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError, RuntimeError) as error:  # The last of a dtype that torch does not know.
            raise DamagedError(f"{self.path(stage)} is not a whole safetensors file: {first_line(error)}") from error


def part_name(stage: int, num_stages: int) -> str:
    return f"stage-{stage:05d}-of-{num_stages:05d}.safetensors"


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Writes a manifest, and waits until it is on the disk.

    Args:
        directory: of the checkpoint.
        content: `step`, `edges` (the layer that each stage ends before), `run`, `parts`, `metrics`, `run_id` and
            `committed`, as in `Manifest`; plain data.
    """
    text = json.dumps(seal({"format": _FORMAT, **content}), indent=2) + "\n"
    write_text(directory / MANIFEST_FILE, text, sync=True)


def note_unusable_rows(directory: Path, rows: Sequence[int], digest_without: str) -> None:
    """Notes in a checkpoint that rows of the next step cannot be used, so that the run may go on once they are mended.

    Args:
        directory: of the checkpoint.
        rows: their numbers, from 0.
        digest_without: of the training rows, as far as it does not depend on what these hold.
    """
    content = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    run = {**content["run"], TRAIN_ROWS: digest_without, _UNUSABLE_ROWS: list(rows)}
    kept = {name: value for name, value in content.items() if name not in ("format", "sha256")}
    write_manifest(directory, {**kept, "run": run})


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's content with its own checksum: one changed digit would give a run other weights without a word."""
    plain = json.loads(json.dumps(content))  # As it will be read: JSON has no tuples, and no keys but strings.
    return {**plain, "sha256": _checksum(plain)}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Reads a checkpoint's manifest and checks all that it says before any of it is used.

    Raises:
        DamagedError: the manifest is missing or altered.
        LoptError: it may not be read, has a format of a later version, or the directory is of another program.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("sha256", None) != _checksum(content):
            raise DamagedError(f"{path} is not what was written: its content differs from the checksum in it")
    except FileNotFoundError as error:
        message = f"{directory} is not a complete checkpoint: it has no {MANIFEST_FILE}"
        raise (LoptError if _is_of_another_program(directory) else DamagedError)(message) from error
    except OSError as error:
        raise _unreadable(error, f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read: {first_line(error)}") from error
    try:
        if content["format"] not in (1, _FORMAT):
            raise LoptError(f"{path} has the format {shown(content['format'])}, and this version reads 1 and {_FORMAT}")
        step, edges, run = content["step"], content["edges"], content["run"]
        parts = tuple(_part(part) for part in content["parts"])
        if [0, *edges] != sorted({0, *map(_natural, edges)}) or len(edges) != len(parts) or not parts:
            raise ValueError("edges")
        if not isinstance(run, dict):
            raise ValueError("run")
        if content["format"] == 1:
            run = {_NAMES_OF_FORMAT_1.get(name, name.removeprefix("--")): value for name, value in run.items()}
        starts = [0, *edges[:-1]]
        specs = tuple(BlockSpec(i, len(edges), *ends) for i, ends in enumerate(zip(starts, edges, strict=True)))
        written = _run_id(content.get("run_id")), _moment(content.get("committed"))
        return Manifest(directory, _natural(step), specs, run, parts, _metrics(content), *written)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(
            f"{path} is not a manifest of a checkpoint (wrong or missing: {first_line(error)})"
        ) from error


def _unreadable(error: OSError, message: str) -> LoptError:
    """Whether a file that cannot be read is a damaged one: not where its owner keeps it from this user."""
    return LoptError(message) if isinstance(error, PermissionError) else DamagedError(message)


def _is_of_another_program(directory: Path) -> bool:
    """Whether a directory without a manifest has files, and none that a run of this package would have written."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return bool(names) and not any(re.fullmatch(r"stage-\d+-of-\d+\.safetensors.*", name) for name in names)


def _part(content: Mapping[str, Any]) -> Part:
    dtype = content.get("dtype")
    others = {name: dtype_of(value) for name, value in content.get("other_dtypes", {}).items()}
    own = None if dtype is None else dtype_of(dtype)
    return Part(_natural(content["size"]), _hex(content["sha256"]), own, others)


def _natural(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(shown(value))
    return value


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    """Of the held-out rows; versions before wrote the loss alone."""
    loss = content.get("eval_loss")
    metrics = content.get("metrics", {} if loss is None else {"eval_loss": loss})
    for name, value in metrics.items():
        if type(value) is not float or not math.isfinite(value):
            raise ValueError(f"{name}: {value!r}")
    return dict(metrics)


def _hex(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(shown(value))
    return value


def _run_id(value: object) -> str | None:
    if value is not None and (not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32}", value)):
        raise ValueError(shown(value))
    return value


def _moment(value: object) -> float | None:
    if value is not None and (type(value) is not float or not 0 <= value < math.inf):
        raise ValueError(shown(value))
    return value


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

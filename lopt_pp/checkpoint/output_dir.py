"""What an output directory may hold: checkpoints, a finished model, and what an earlier run has left there."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lopt_pp.errors import LoptError
from lopt_pp.util.files import UNFINISHED

MANIFEST_FILE = "manifest.json"
"""Of a checkpoint, and of nothing else."""

INDEX_FILE = "model.safetensors.index.json"
"""Of a model: transformers' `SAFE_WEIGHTS_INDEX_NAME`, which takes seconds to import."""

RUN_FILE = "run.json"
"""Of a run, in its output directory: see `lopt_pp.metrics.run_info`."""

LATEST = "latest"
"""Names the newest whole checkpoint of an output directory, for --resume_from_checkpoint."""

_NAME = re.compile(r"checkpoint-(\d+)")


def remove_unfinished_checkpoints(output_dir: Path) -> None:
    """Removes what a run left that ended while it saved."""
    for path in output_dir.glob("checkpoint-*" + UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint, and not an ordinary model."""
    return (directory / MANIFEST_FILE).exists()


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The directories of complete checkpoints, the newest first."""
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def check_no_checkpoints(output_dir: Path, but: str | None) -> None:
    """Sees that a run which does not go on from them will not mix its checkpoints with another one's.

    Args:
        output_dir: of the run.
        but: a checkpoint that the run goes on from; it, and older ones, may be there.

    Raises:
        LoptError: others are there.
    """
    there = complete_checkpoints(output_dir)
    if there and (but is None or Path(but).resolve() != there[0].resolve()):
        raise LoptError(earlier_run(output_dir, there[0].name))


def earlier_run(output_dir: Path, checkpoint: str) -> str:
    """The error of a run that would mix its checkpoints with another one's, of which one has this name."""
    return (
        f"--output_dir {output_dir} holds {checkpoint} of an earlier run; --resume_from_checkpoint latest goes on from "
        f"it, --overwrite_output_dir removes it"
    )


def remove_checkpoints(output_dir: Path, after: int) -> None:
    """Removes the checkpoints of more than `after` steps."""
    for path in complete_checkpoints(output_dir):
        if int(path.name.rsplit("-", 1)[1]) > after:
            remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint: half of one, left by a process that was killed meanwhile, must not have its name."""
    unfinished = path.with_name(f"{path.name}.removed{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    os.replace(path, unfinished)
    shutil.rmtree(unfinished, ignore_errors=True)


def holds_whole_model(path: Path) -> bool:
    """Whether the directory has a model that a run has finished: the index is what comes to its place last."""
    return (path / INDEX_FILE).exists()


@dataclass(frozen=True)
class ModelOrigin:
    """Which run a model is of: what `origin_as_metadata` puts into its index.

    Attributes:
        run_id: of the run.
        num_steps: that were planned.
        steps_done: that the run has made: fewer where it finished early.
        reason: why it did; None where it did not.
    """

    run_id: str
    num_steps: int
    steps_done: int
    reason: str | None = None

    @property
    def how_far(self) -> str:
        """The steps that the run has made, in words."""
        if self.reason is None:
            return f"{self.steps_done} steps"
        return f"{self.steps_done} of {self.num_steps} steps ({self.reason})"


def model_origin(path: Path) -> ModelOrigin | None:
    """Which run the model in a directory is of; None where its index does not say so."""
    try:
        metadata = json.loads((path / INDEX_FILE).read_text(encoding="utf-8"))["metadata"]
        run_id, num_steps = metadata["lopt_pp_run_id"], metadata["lopt_pp_num_steps"]
        # Only of a run that finished early.
        steps_done, reason = metadata.get("lopt_pp_steps_done", num_steps), metadata.get("lopt_pp_finished_early")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not (isinstance(run_id, str) and isinstance(num_steps, int) and isinstance(steps_done, int)):
        return None
    return ModelOrigin(run_id, num_steps, steps_done, None if reason is None else str(reason))


def origin_as_metadata(origin: ModelOrigin) -> dict[str, str | int]:
    """For the metadata of a model's index."""
    metadata: dict[str, str | int] = {"lopt_pp_run_id": origin.run_id, "lopt_pp_num_steps": origin.num_steps}
    if origin.reason is not None:
        metadata |= {"lopt_pp_steps_done": origin.steps_done, "lopt_pp_finished_early": origin.reason}
    return metadata


def open_output_dir(path: Path, overwrites: bool, resumes: bool, resumes_from: str | None) -> None:
    """Sees that a run can leave its model and its checkpoints in the output directory, which is made if missing.

    Where the run goes on from a checkpoint and a model is there, `lopt_pp.checkpoint.finished` has the last word, once
    it is known whose they are.

    Args:
        path: of the directory.
        overwrites: whether the run may replace what an earlier one left there.
        resumes: whether it goes on from the newest checkpoint there, if there is one.
        resumes_from: the checkpoint that it is told to go on from, if any.

    Raises:
        LoptError: it holds what the run may not replace, is not a directory, or cannot be written.
    """
    check_output_dir(path, overwrites, resumes or resumes_from is not None)
    if not (overwrites or resumes):
        check_no_checkpoints(path, but=resumes_from)


def check_no_model(path: Path, overwrite: bool, resumes: bool = False) -> None:
    """Sees that a run will not put its model in place of another; the arguments are those of `check_output_dir`.

    Raises:
        LoptError: the directory holds a model already.
    """
    files = ("model.safetensors",) if resumes else ("*.safetensors*", "config.json")
    is_foreign = resumes and holds_whole_model(path) and model_origin(path) is None and not (path / RUN_FILE).exists()
    if not overwrite and (is_foreign or any(any(path.glob(name)) for name in files)):
        raise LoptError(
            f"--output_dir {path} already holds a model; give another, or --overwrite_output_dir to replace it"
        )


def check_is_directory(path: Path) -> None:
    """Sees that what is at a path is a directory, or can become one.

    Raises:
        LoptError: there is something else.
    """
    if path.is_dir():
        return
    if path.exists():
        raise LoptError(f"--output_dir {path} is a file; give a directory")
    if link := next((part for part in (path, *path.parents) if part.is_symlink() and not part.exists()), None):
        which = "" if link == path else f": {link}"
        raise LoptError(
            f"--output_dir {path}{which} is a link to {link.readlink()}, which is not there; make that directory"
        )


def check_output_dir(path: Path, overwrite: bool, resumes: bool = False) -> None:
    """Sees that the output directory can take a model.

    Args:
        path: of the directory; made where it is missing.
        overwrite: whether it may hold a model.
        resumes: whether it may hold a run's model, or what a run has left that was killed while it moved its model
            there.

    Raises:
        LoptError: it holds a model already, is not a directory, or cannot be written.
    """
    check_no_model(path, overwrite, resumes)
    try:
        check_is_directory(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise LoptError(f"--output_dir {path} cannot be written: {error.strerror}") from error


def remove_unfinished(path: Path) -> None:
    """Removes what a run that failed while it saved has left."""
    shutil.rmtree(path / UNFINISHED, ignore_errors=True)


DESCRIPTION = ".description" + UNFINISHED
"""There while it is tried, before the first step, whether all of the model but its weights can be saved."""


PUSHED = ".pushed" + UNFINISHED
"""Has the checkpoints that are being pushed to the hub."""


STOPPED = "stopped.json"
"""Is in the output directory of a run that was asked to stop, until it is started again."""


def remove_leftovers(output_dir: Path) -> None:
    """Removes what an earlier run left half-written, and its word of where it was stopped."""
    remove_unfinished(output_dir)
    shutil.rmtree(output_dir / DESCRIPTION, ignore_errors=True)
    shutil.rmtree(output_dir / PUSHED, ignore_errors=True)
    (output_dir / STOPPED).unlink(missing_ok=True)

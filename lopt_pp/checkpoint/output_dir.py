"""What an output directory may hold: checkpoints, a finished model, and what an earlier run has left there."""

import re
import shutil
import tempfile
from pathlib import Path

from lopt_pp.errors import LoptError
from lopt_pp.util.files import UNFINISHED

MANIFEST_FILE = "manifest.json"
"""Of a checkpoint, and of nothing else."""

INDEX_FILE = "model.safetensors.index.json"
"""Of a model: transformers' `SAFE_WEIGHTS_INDEX_NAME`, which takes seconds to import."""

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
        raise LoptError(
            f"--output_dir {output_dir} holds {there[0].name} of an earlier run; --resume_from_checkpoint latest goes "
            f"on from it, --overwrite_output_dir removes it"
        )


def remove_checkpoints(output_dir: Path, after: int) -> None:
    """Removes the checkpoints of more than `after` steps."""
    for path in complete_checkpoints(output_dir):
        if int(path.name.rsplit("-", 1)[1]) > after:
            shutil.rmtree(path)


def holds_whole_model(path: Path) -> bool:
    """Whether the directory has a model that a run has finished: the index is what comes to its place last."""
    return (path / INDEX_FILE).exists()


def open_output_dir(path: Path, overwrites: bool, resumes: bool, resumes_from: str | None) -> None:
    """Sees that a run can leave its model and its checkpoints in the output directory, which is made if missing.

    Args:
        path: of the directory.
        overwrites: whether the run may replace what an earlier one left there.
        resumes: whether it goes on from the newest checkpoint there, if there is one.
        resumes_from: the checkpoint that it is told to go on from, if any.

    Raises:
        LoptError: it holds what the run may not replace, is not a directory, or cannot be written.
    """
    check_output_dir(path, overwrites, resumes)
    if not (overwrites or resumes):
        check_no_checkpoints(path, but=resumes_from)


def check_output_dir(path: Path, overwrite: bool, resumes: bool = False) -> None:
    """Sees that the output directory can take a model.

    Args:
        path: of the directory; made where it is missing.
        overwrite: whether it may hold a model.
        resumes: whether it may hold what a run has left that was killed while it moved its model there.

    Raises:
        LoptError: it holds a model already, is not a directory, or cannot be written.
    """
    files = ("model.safetensors",) if resumes else ("*.safetensors*", "config.json")
    if not overwrite and any(any(path.glob(name)) for name in files):
        raise LoptError(
            f"--output_dir {path} already holds a model; give another, or --overwrite_output_dir to replace it"
        )
    try:
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


STOPPED = "stopped.json"
"""Is in the output directory of a run that was asked to stop, until it is started again."""


def remove_leftovers(output_dir: Path) -> None:
    """Removes what an earlier run left half-written, and its word of where it was stopped."""
    remove_unfinished(output_dir)
    shutil.rmtree(output_dir / DESCRIPTION, ignore_errors=True)
    (output_dir / STOPPED).unlink(missing_ok=True)

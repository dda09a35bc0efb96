"""Whether a run that is to go on has come to its end already, and whether it may replace the model that is there."""

import json
import logging
from pathlib import Path

from lopt_pp.checkpoint.output_dir import RUN_FILE, holds_whole_model, model_origin
from lopt_pp.checkpoint.resume import Start, Wanted
from lopt_pp.errors import LoptError

logger = logging.getLogger(__name__)


def is_finished(start: Start, wanted: Wanted) -> bool:
    """Whether the run has left its model already, and has no more steps to do. For rank 0, before anything is written.

    Raises:
        LoptError: the output directory has a model that the run may not replace.
    """
    path = wanted.output_dir
    if wanted.overwrites or not holds_whole_model(path):
        return False
    origin = model_origin(path)
    if origin is None:  # Of a version that did not write down whose it is.
        logger.info("%s has the trained model already; --overwrite_output_dir trains on from the checkpoint", path)
        return True
    run_id = start.run_id if start.manifest is not None else _last_run_id(path)
    if origin.run_id not in (run_id, start.run_id):
        raise LoptError(
            f"--output_dir {path} holds the model of another run; give another, or --overwrite_output_dir to replace it"
        )
    if origin.num_steps == wanted.num_steps:
        longer = "--overwrite_output_dir" if origin.reason is not None else "a larger --max_steps or --num_train_epochs"
        logger.info(
            "the run is finished: %s has its model, after %s; %s goes on from there", path, origin.how_far, longer
        )
        return True
    if start.manifest is None or origin.num_steps > wanted.num_steps:
        what = "it has no checkpoint to go on from" if start.manifest is None else f"the run has {wanted.num_steps}"
        raise LoptError(
            f"--output_dir {path} holds the run's model after {origin.how_far}, and {what}; give another, or "
            f"--overwrite_output_dir to replace it"
        )
    return False


def steps_of_model(wanted: Wanted) -> int:
    """How many steps the model of a finished run has been trained for; fewer than planned where it finished early."""
    origin = model_origin(wanted.output_dir)
    return wanted.num_steps if origin is None else origin.steps_done


def _last_run_id(output_dir: Path) -> str | None:
    """Of the run that was started last in an output directory; None where that is not known."""
    try:
        run_id = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run_id if isinstance(run_id, str) else None

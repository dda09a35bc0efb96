"""The best model of a run by its loss on the held-out rows, found among the checkpoints and brought back at the end.

A checkpoint's loss is in its manifest, so a run that was stopped and goes on knows of the models from before. Only
rank 0 looks for the best, once training is over; it tells the step, and each stage reads its own part.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lopt_pp.checkpoint.compatibility import EVALUATION_ROWS
from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.checkpoint.parts import OpenParts
from lopt_pp.checkpoint.resume import Resumable, parts_held
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError
from lopt_pp.model.partition import BlockSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Measured:
    """A model of a run and what it does on the held-out rows; the better of two is the lesser, the earlier of equals.

    Attributes:
        loss: mean cross-entropy of their target tokens, in nats; infinite where it is not finite.
        step: the optimizer steps that the model has done.
    """

    loss: float
    step: int


def best_checkpoint(output_dir: Path, run_id: str, evaluation_rows: str) -> Path | None:
    """A run's checkpoint with the lowest loss on the rows with this digest; None where none was evaluated on them."""
    found = _evaluated(output_dir, run_id, evaluation_rows)
    return output_dir / f"checkpoint-{min(found).step}" if found else None


def rank_models(output_dir: Path, run_id: str, evaluation_rows: str, last: Measured) -> list[Measured]:
    """The models that there are at the end of a run, down to the last step's, the best first.

    Args:
        output_dir: with the checkpoints.
        run_id: of the run.
        evaluation_rows: the digest of the rows that they must have been evaluated on.
        last: the last step's.
    """
    models = [
        model for model in _evaluated(output_dir, run_id, evaluation_rows) if model.step < last.step and model < last
    ]
    return [*sorted(models), last]


def load_best(
    world: World,
    models: Sequence[Measured],
    output_dir: Path,
    stages: Sequence[Resumable],
    specs: Sequence[BlockSpec],
    checks_parts: bool,
) -> Measured:
    """Gives the stages the weights of the best model that can be read. All processes must call this.

    Args:
        world: this process.
        models: of `rank_models`; only those of rank 0 count.
        output_dir: with the checkpoints.
        stages: of this process, after the last step.
        specs: of all stages.
        checks_parts: whether this process compares its parts with their checksums (one replica does).

    Returns:
        The model that they have then.
    """
    # Rank 0 alone has the losses; the others follow its order.
    ranked = world.from_rank_0("best", lambda: [(model.loss, model.step) for model in models])
    *candidates, last = (Measured(*model) for model in ranked)
    for model in candidates:
        problem = ""
        with ExitStack() as stack:
            try:
                manifest = read_manifest(output_dir / f"checkpoint-{model.step}")
                own = parts_held(manifest, [stage.index for stage in stages], specs)
                for part in own if checks_parts else ():
                    manifest.check_part(part)
                weights = stack.enter_context(OpenParts(manifest, own, "block."))
                for name in weights:
                    weights[name]  # Once for the sake of a disk that fails: later there is no other model to take.
            except LoptError as error:
                problem = str(error)
            # A part that one process cannot read makes the model unusable for all.
            problem = world.first_error(f"best/{model.step}", problem)
            if not problem:
                for stage in stages:
                    stage.resume_weights(weights, model.step)
        if not problem:
            if world.rank == 0:
                logger.info("the model after step %d is the best, with an eval loss of %.4g", model.step, model.loss)
            return model
        if world.rank == 0:
            logger.warning("%s; the next best model is taken", problem)
    if world.rank == 0:
        logger.info("the model after the last step is the best, with an eval loss of %.4g", last.loss)
    return last


def compare_with_start(start: float | None, model: Measured) -> None:
    """Warns where a run has made the model worse on the held-out rows than it was before the first step.

    The pretrained model is not a checkpoint of the run, so it is never the best one of it.

    Args:
        start: the pretrained model's loss; None where it was not measured.
        model: the one that is saved.
    """
    if start is not None and model.loss > start:
        logger.warning(
            "the run has made the model worse on the held-out rows: its eval loss is %.4g, and was %.4g before the "
            "first step; `lopt-pp report` says what may help",
            model.loss,
            start,
        )


def _evaluated(output_dir: Path, run_id: str, evaluation_rows: str) -> list[Measured]:
    """The models of a run's checkpoints that were evaluated on these rows."""
    found = []
    for path in complete_checkpoints(output_dir):
        try:
            manifest = read_manifest(path)
        except LoptError as error:
            logger.warning("%s; it is not compared with others", error)
            continue
        is_own = manifest.run_id in (run_id, None)  # None of a version whose runs had no ids.
        if is_own and manifest.eval_loss is not None and manifest.run.get(EVALUATION_ROWS) == evaluation_rows:
            found.append(Measured(manifest.eval_loss, manifest.step))
    return found

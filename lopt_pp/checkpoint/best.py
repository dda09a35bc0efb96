"""The best model of a run on the held-out rows, found among the checkpoints and brought back at the end.

What was measured of a checkpoint is in its manifest, so a run that was stopped and goes on knows of the models from
before. Only rank 0 looks for the best, once training is over; it tells the step, and each stage reads its own part.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lopt_pp.checkpoint.compatibility import EVALUATION_ROWS
from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.checkpoint.parts import OpenParts
from lopt_pp.checkpoint.resume import Resumable, parts_held
from lopt_pp.config.evaluation import EvaluationConfig, eval_prefix
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError
from lopt_pp.model.partition import BlockSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Criterion:
    """What models of a run are compared by.

    Attributes:
        metric: its name, with `eval_` before it.
        greater_is_better: whether the better model has the greater value.
    """

    metric: str
    greater_is_better: bool

    def score(self, metrics: Mapping[str, float]) -> float:
        """Of a model by what was measured of it: the lesser the better; infinite where there is no finite value."""
        value = metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return math.inf
        return -value if self.greater_is_better else value

    def in_words(self, metrics: Mapping[str, float]) -> str:
        """For messages, what a model has."""
        called = "eval loss" if self.metric == "eval_loss" else self.metric
        return f"{called} of {metrics.get(self.metric, math.nan):.4g}"


def choose_criterion(
    config: EvaluationConfig, set_names: Sequence[str], more: Iterable[str] = (), saves_best: bool = False
) -> Criterion | None:
    """What the models of a run are compared by; None where the flags do not say it and there are several losses.

    Args:
        config: the flags.
        set_names: of the sets of held-out rows.
        more: what is measured of each set besides loss and perplexity, by its name without a prefix.
        saves_best: whether only the best are saved.

    Raises:
        LoptError: there is no such metric, or it must be named.
    """
    losses = [f"{eval_prefix(name)}loss" for name in set_names]
    others = [f"{eval_prefix(name)}{metric}" for name in set_names for metric in ("perplexity", *more)]
    given = config.metric_for_best_model
    if given is None:
        if len(losses) == 1:
            return Criterion(losses[0], bool(config.greater_is_better))
        if config.chooses or saves_best:
            flag = "load_best_model_at_end" if config.load_best_model_at_end else "early_stopping_patience"
            flag = flag if config.chooses else "save_strategy best"
            raise LoptError(
                f"--{flag} with several evaluation sets needs --metric_for_best_model: one of {', '.join(losses)} (or "
                f"{', '.join(others)})"
            )
        return None
    name = given if given.startswith("eval_") else f"eval_{given}"
    if name not in (*losses, *others):
        raise LoptError(
            f"--metric_for_best_model {given}: nothing of that name is measured; give one of "
            f"{', '.join([*losses, *others])}"
        )
    return criterion_named(config, given)


def criterion_named(config: EvaluationConfig, metric: str) -> Criterion:
    """What models are compared by, by its name with or without `eval_`, whether it is measured or not."""
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    is_loss = name.endswith(("loss", "perplexity"))
    return Criterion(name, not is_loss if config.greater_is_better is None else config.greater_is_better)


@dataclass(frozen=True)
class Measured:
    """A model of a run and what it does on the held-out rows.

    Attributes:
        metrics: what was measured of it, by name, where it is finite.
        step: the optimizer steps that the model has done.
    """

    metrics: Mapping[str, float]
    step: int


def best_checkpoint(output_dir: Path, run_id: str, evaluation_rows: str, criterion: Criterion) -> Path | None:
    """The best of a run's checkpoints on the rows with this digest; None where none was evaluated on them."""
    found = _evaluated(output_dir, run_id, evaluation_rows, criterion)
    return output_dir / f"checkpoint-{found[0].step}" if found else None


def is_best(
    output_dir: Path, run_id: str, evaluation_rows: str, criterion: Criterion, metrics: Mapping[str, float]
) -> bool:
    """Whether a model is better than all checkpoints of a run that were evaluated on the same rows."""
    found = _evaluated(output_dir, run_id, evaluation_rows, criterion)
    score = criterion.score(metrics)
    return score < math.inf and all(score < criterion.score(model.metrics) for model in found)


def rank_models(
    output_dir: Path, run_id: str, evaluation_rows: str, criterion: Criterion, last: Measured
) -> list[Measured]:
    """The models that there are at the end of a run, down to the last step's, the best first.

    Args:
        output_dir: with the checkpoints.
        run_id: of the run.
        evaluation_rows: the digest of the rows that they must have been evaluated on.
        criterion: what they are compared by.
        last: the last step's.
    """
    limit = criterion.score(last.metrics)
    found = _evaluated(output_dir, run_id, evaluation_rows, criterion)
    # Of equals the earlier one is better.
    return [*(m for m in found if m.step < last.step and criterion.score(m.metrics) <= limit), last]


def load_best(
    world: World,
    models: Sequence[Measured],
    criterion: Criterion,
    output_dir: Path,
    stages: Sequence[Resumable],
    specs: Sequence[BlockSpec],
    checks_parts: bool,
) -> Measured:
    """Gives the stages the weights of the best model that can be read. All processes must call this.

    Args:
        world: this process.
        models: of `rank_models`; only those of rank 0 count.
        criterion: what they are compared by.
        output_dir: with the checkpoints.
        stages: of this process, after the last step.
        specs: of all stages.
        checks_parts: whether this process compares its parts with their checksums (one replica does).

    Returns:
        The model that they have then.
    """
    # Rank 0 alone knows what was measured; the others follow its order.
    ranked = world.from_rank_0("best", lambda: [(dict(model.metrics), model.step) for model in models])
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
                words = criterion.in_words(model.metrics)
                logger.info("the model after step %d is the best, with an %s", model.step, words)
            return model
        if world.rank == 0:
            logger.warning("%s; the next best model is taken", problem)
    if world.rank == 0:
        logger.info("the model after the last step is the best, with an %s", criterion.in_words(last.metrics))
    return last


def compare_with_start(start: Mapping[str, float], model: Measured, set_names: Sequence[str]) -> None:
    """Warns where a run has made the model worse on held-out rows than it was before the first step.

    The pretrained model is not a checkpoint of the run, so it is never the best one of it.

    Args:
        start: what was measured of the pretrained model; nothing where it was not.
        model: the one that is saved.
        set_names: of the sets of held-out rows.
    """
    for name in set_names:
        loss = f"{eval_prefix(name)}loss"
        before, after = start.get(loss), model.metrics.get(loss, math.inf)
        if before is not None and after > before:
            logger.warning(
                "the run has made the model worse on the held-out rows%s: its eval loss is %.4g, and was %.4g before "
                "the first step; `lopt-pp report` says what may help",
                f" {name}" if name else "",
                after,
                before,
            )


def _evaluated(output_dir: Path, run_id: str, evaluation_rows: str, criterion: Criterion) -> list[Measured]:
    """The models of a run's checkpoints that were evaluated on these rows; the best first, of equals the earlier."""
    found = []
    for path in complete_checkpoints(output_dir):
        try:
            manifest = read_manifest(path)
        except LoptError as error:
            logger.warning("%s; it is not compared with others", error)
            continue
        is_own = manifest.run_id in (run_id, None)  # None of a version whose runs had no ids.
        if is_own and criterion.metric in manifest.metrics and manifest.run.get(EVALUATION_ROWS) == evaluation_rows:
            found.append(Measured(manifest.metrics, manifest.step))
    return sorted(found, key=lambda model: (criterion.score(model.metrics), model.step))

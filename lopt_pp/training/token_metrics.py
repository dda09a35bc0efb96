"""What an evaluation measures of single tokens, on the last stage: accuracy, entropy, and metrics of the user's own.

Of each target token there are the loss and the likeliest token; logits are made some rows at a time and let go. With
replicas of the pipeline each has a share of the rows. Sums add up where all records are joined; what the user's
function is to see of all rows comes to the last stage's first replica, which calls it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import EvalPrediction

from lopt_pp.checkpoint.best import Criterion, choose_criterion
from lopt_pp.config.evaluation import EvaluationConfig, eval_prefix
from lopt_pp.config.train_config import Config
from lopt_pp.data import IGNORE_INDEX, Microbatch, TokenizedRows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.errors import LoptError
from lopt_pp.metrics.records import Record
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives import local_objective_class
from lopt_pp.objectives.token_losses import TokenLosses, token_losses
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.training.held_out import Evaluation, EvaluationPart
from lopt_pp.training.own_metrics import ComputeMetrics, computed_by
from lopt_pp.util.user_code import load_user_function

logger = logging.getLogger(__name__)

_TRIED_ROWS = 2

_TAKEN = ("loss", "perplexity", "seconds")


@dataclass(frozen=True)
class TokenMetrics:
    """What a run measures of single tokens, and what it makes of that.

    Attributes:
        names: of `--eval_metrics`.
        compute: the user's function; None where there is none.
        called: what messages call it.
        computed: what it returns, by name.
    """

    names: Sequence[str] = ()
    compute: ComputeMetrics | None = None
    called: str = "compute_metrics"
    computed: Sequence[str] = field(default=())
    _told: list[bool] = field(default_factory=list, compare=False)

    @property
    def all_names(self) -> list[str]:
        """What there is of each set of rows besides its loss and perplexity; names without the set's prefix."""
        return [*self.names, *self.computed]

    def check_names(self, values: Mapping[str, float]) -> None:
        """Sees what the user's function returns, and warns once where it is not of the same names as when it was tried.

        Raises:
            LoptError: one of the names is that of something else that is measured.
        """
        if taken := [name for name in values if name in (*_TAKEN, *self.names)]:
            raise LoptError(f"{self.called} returns {taken[0]}, which is measured anyway; call it something else")
        missing, new = (
            [name for name in one if name not in other]
            for one, other in (
                (self.computed, values),
                (values, self.computed),
            )
        )
        if (missing or new) and self.computed and not self._told:
            self._told.append(True)
            what = [f"{words} {', '.join(names)}" for words, names in (("no", missing), ("also", new)) if names]
            logger.warning(
                "%s returns %s, other than when it was tried before the first step: a curve, and whatever compares by "
                "a metric, lacks the evaluations without it",
                self.called,
                " and ".join(what),
            )


def find_metrics(
    config: EvaluationConfig, sets: EvaluationSets | None, given: ComputeMetrics | None = None
) -> TokenMetrics | None:
    """What the flags, or a script, have a run measure of single tokens; None where that is nothing.

    The function is tried on some rows with the best predictions that there can be.

    Args:
        config: the flags.
        sets: of rows to evaluate on; None where there are none.
        given: a script's function, in place of the one that flags name.

    Raises:
        LoptError: there is no such function, it fails on these rows, or it does not return numbers.
    """
    called, compute = "compute_metrics", given
    if compute is not None and config.compute_metrics is not None:
        raise LoptError(f"compute_metrics and --compute_metrics {config.compute_metrics} are both given; give one")
    if compute is None and config.compute_metrics is not None:
        called = f"--compute_metrics {config.compute_metrics}"
        compute = load_user_function("--compute_metrics", config.compute_metrics, "package.module:function")
    names = tuple(dict.fromkeys(config.eval_metrics or ()))
    if sets is None or (compute is None and not names):
        return None
    if compute is None:
        return TokenMetrics(names)
    rows = next(iter(sets.rows.values()))
    tried = f"{called}, tried on rows whose tokens are all predicted right,"
    values = computed_by(compute, tried, _perfect(rows), eval_prefix(sets.names[0]))
    metrics = TokenMetrics(names, compute, called, tuple(values))
    metrics.check_names(values)
    return metrics


def find_criterion(config: Config, sets: EvaluationSets | None, metrics: TokenMetrics | None) -> Criterion | None:
    """What the models of a run are compared by, of all that is measured; None where there is nothing to compare.

    Raises:
        LoptError: there is no such metric, it must be named, or a set's name is one that a stage's loss has.
    """
    local = local_objective_class(config.objective)
    for name in () if sets is None else sets.names:
        if local is not None and local.name == f"{name}_loss":
            raise LoptError(f"--eval_file {name}=...: a stage's loss is called {local.name}; give the set another name")
    more = () if metrics is None else metrics.all_names
    return None if sets is None else choose_criterion(config.evaluation, sets.names, more, config.checkpoint.only_best)


@dataclass(frozen=True)
class _Found:
    """Of a microbatch.

    Attributes:
        sums: over its targets, of what `--eval_metrics` names, by name.
        predictions: int32 [sequences, tokens], on the CPU; None where no function is to see them, as are the others.
        losses: float32 [sequences, tokens], likewise.
        is_row: bool [sequences], what is not padding alone, likewise.
    """

    sums: Mapping[str, torch.Tensor]
    predictions: torch.Tensor | None = None
    losses: torch.Tensor | None = None
    is_row: torch.Tensor | None = None


class TokenMeter:
    """Measures the tokens of one evaluation, in a process of the last stage.

    Args:
        metrics: what is wanted.
    """

    def __init__(self, metrics: TokenMetrics) -> None:
        self._metrics = metrics
        self._found: list[_Found] = []

    def measure(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        """The loss of a microbatch, summed over its targets, a float32 scalar; what is said of them is kept."""
        found = token_losses(output, batch, entropies="entropy" in self._metrics.names)
        sums = {"mean_token_accuracy": (found.likeliest == batch.targets).sum()}
        if found.entropies is not None:
            sums["entropy"] = found.entropies.sum()
        self._found.append(_Found(sums) if self._metrics.compute is None else _with_rows(sums, found, batch))
        return found.losses.sum()

    def values(self, evaluation: Evaluation, replicas: Replicas | None) -> Record:
        """This replica's share of what was measured of each set of rows, by its name in records.

        All replicas of the stage must call this, when the evaluation has come to its end.

        Args:
            evaluation: the rows.
            replicas: of the stage; None if there is only this one.

        Raises:
            LoptError: the user's function fails, or does not return numbers.
        """
        values, rest = Record(), iter(self._found)
        for part in evaluation.parts:
            own = [next(rest) for _ in range(part.num_microbatches)]
            for name in self._metrics.names:
                total = torch.stack([found.sums[name] for found in own]).double().sum().item()
                values[f"{part.prefix}{name}"] = total / max(part.counts.num_targets, 1)
            if self._metrics.compute is not None:
                values |= self._computed(self._metrics.compute, part, own, replicas)
        return values

    def _computed(
        self,
        compute: ComputeMetrics,
        part: EvaluationPart,
        own: Sequence[_Found],
        replicas: Replicas | None,
    ) -> Record:
        """What the user's function returns, in the first replica; nothing in the others."""
        tensors = _gathered(*_as_rows(part.rows, own), part.rows, part.rows_per_microbatch, replicas)
        if tensors is None:
            return {}
        values = computed_by(compute, self._metrics.called, _prediction(part.rows, *tensors), part.prefix)
        self._metrics.check_names(values)
        return {f"{part.prefix}{name}": value for name, value in values.items()}


def _with_rows(sums: Mapping[str, torch.Tensor], found: TokenLosses, batch: Microbatch) -> _Found:
    shape, places = batch.input_ids.shape, batch.target_indices.cpu()
    predictions = torch.full((shape.numel(),), IGNORE_INDEX, dtype=torch.int32)
    predictions[places] = found.likeliest.cpu().int()
    losses = torch.zeros(shape.numel())
    losses[places] = found.losses.cpu()
    # A replica without rows has a microbatch of padding.
    return _Found(sums, predictions.view(shape), losses.view(shape), batch.token_mask.any(1).cpu())


def _as_rows(rows: TokenizedRows, own: Sequence[_Found]) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens (int32) and the losses (float32) of a replica's rows, `[rows, tokens]`, on the CPU."""
    width = int(rows.lengths.max())
    predictions, losses = list[torch.Tensor](), list[torch.Tensor]()
    for found in own:
        assert found.predictions is not None and found.losses is not None
        missing = (0, width - found.predictions.shape[1])
        predictions.append(F.pad(found.predictions, missing, value=IGNORE_INDEX)[found.is_row])
        losses.append(F.pad(found.losses, missing)[found.is_row])
    return torch.cat(predictions), torch.cat(losses)


def _gathered(
    predictions: torch.Tensor,
    losses: torch.Tensor,
    rows: TokenizedRows,
    rows_per_microbatch: int,
    replicas: Replicas | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Those of all rows, in their order, in the first replica; None in the others."""
    if replicas is None:
        return predictions, losses
    owners = torch.arange(len(rows)) // rows_per_microbatch % replicas.size
    most, group, is_first = int((owners == 0).sum()), replicas.mesh.get_group(), replicas.mesh.get_local_rank() == 0
    joined = []
    for own in (predictions, losses):
        sent = own.new_zeros(most, own.shape[1])
        sent[: len(own)] = own
        parts = [torch.empty_like(sent) for _ in range(replicas.size)] if is_first else None
        dist.gather(sent, parts, group=group, group_dst=0)
        if parts is not None:
            whole = sent.new_empty(len(rows), own.shape[1])
            for replica, part in enumerate(parts):
                mine = owners == replica
                whole[mine] = part[: int(mine.sum())]
            joined.append(whole)
    return (joined[0], joined[1]) if is_first else None


def _labels(rows: TokenizedRows, number: int) -> np.ndarray:
    """int64 [rows, tokens] of the first rows, -100 behind the end of each."""
    labels = np.full((number, int(rows.lengths.max())), IGNORE_INDEX)
    for place, pack in enumerate(rows.fetch(np.arange(number))):
        (row,) = pack.read()
        labels[place, : len(row.labels)] = row.labels
    return labels


def _prediction(rows: TokenizedRows, predictions: torch.Tensor, losses: torch.Tensor) -> EvalPrediction:
    made = EvalPrediction(predictions.long().numpy(), _labels(rows, len(predictions)))
    made.losses = losses.numpy()  # Not given above: `predictions, labels = prediction` is to unpack two.
    return made


def _perfect(rows: TokenizedRows) -> EvalPrediction:
    """Of some rows, as a model would have it that knows them by heart."""
    labels = torch.from_numpy(_labels(rows, min(_TRIED_ROWS, len(rows))))
    predictions = torch.full_like(labels, IGNORE_INDEX)
    predictions[:, :-1] = labels[:, 1:]
    return _prediction(rows, predictions, torch.zeros(labels.shape))

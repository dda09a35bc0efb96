"""The task: what the last block learns from, and all blocks end to end.

Whatever needs the task's loss asks here for it: the last stage, the auxiliary networks of earlier ones, the end-to-end
pipeline, evaluation, and whoever names it. So a task that learns from something else than the next token is named here.
"""

from collections.abc import Mapping

import torch

from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.data import Microbatch
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives.base import Objective
from lopt_pp.objectives.next_token import NextToken
from lopt_pp.objectives.token_losses import token_losses


class MeasuredNextToken(NextToken):
    """Also measures single tokens while it trains, as `--train_metrics` says and TRL does.

    The logits are made once more for that, some rows at a time.

    Args:
        config: the flags.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._names = tuple(config.train_metrics or ())
        self._sums: dict[str, torch.Tensor] = {}

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        if self.training:
            found = token_losses(output, batch, entropies="entropy" in self._names)
            sums = {"mean_token_accuracy": (found.likeliest == batch.targets).sum().float()}
            if found.entropies is not None:
                sums["entropy"] = found.entropies.sum()
            for name in self._names:
                self._sums[name] = self._sums[name] + sums[name] if name in self._sums else sums[name]
        return super().forward(output, batch)

    def take(self) -> Mapping[str, torch.Tensor]:
        """Sums over the targets since this was called last, by name: float32 scalars."""
        taken, self._sums = self._sums, {}
        return taken


def task_objective_class(config: ObjectiveConfig) -> type[Objective]:
    """The class of the task's loss: its name in metrics, and what of a step counts, before there is a block."""
    return NextToken


def task_objective(config: ObjectiveConfig, measures: bool = False) -> Objective:
    """The task's loss. It has no parameters: those that it trains are the block's, or the auxiliary network's.

    Args:
        config: the flags.
        measures: whether it measures what `--train_metrics` names, as the last block's does.
    """
    return MeasuredNextToken(config) if measures and config.train_metrics else NextToken(config)

"""What a local objective is.

To add one, write a subclass of `Objective` in a file beside this one and name it in `choice.py`; or in any module, and
name it on the command line: `--local_objective package.module:Class`. See `docs/objectives.md`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.model.partition import BlockSpec


@dataclass(frozen=True)
class Site:
    """The block that an objective is for, and what it may be made from.

    Attributes:
        block: that learns from it, with its pretrained weights in float32, on the CPU; where the objective does not
            look at their values (`Objective.reads_weights`), on the device that trains them or, sharded, on none.
        config: the flags.
        generator: to draw initial weights from; a function of the run's seed and the stage alone.
        load: makes a model of further layers of the pretrained one, with their weights, likewise. The `BlockSpec` says
            which layers, and whether what follows the last one (norm, output head) comes with them.
    """

    block: BlockModel
    config: ObjectiveConfig
    generator: torch.Generator
    load: Callable[[BlockSpec], BlockModel]

    @property
    def hidden_size(self) -> int:
        """Of the hidden states that enter and leave the block."""
        return self.block.model.config.hidden_size


class Objective(nn.Module, ABC):
    """A loss of one block: sees the block's output and input and the microbatch, and never another stage.

    It is made by `Class(site)`, in each process of the stage alike. Its parameters are trained with the block's, by the
    same optimizer, and exist in training only. A frozen one (`requires_grad` is False) is in no checkpoint, so the
    constructor must give it the same value each time. It moves to the device and the dtype of the weights by itself.
    """

    name: ClassVar[str]
    """The loss's name in logs and metrics; it ends in `_loss`."""

    rate_share: ClassVar[float] = 0.1
    """The block's peak learning rate where `--local_learning_rate` is not given, as a share of `--learning_rate`."""

    safe_rate_share: ClassVar[float | None] = None
    """The largest share of `--learning_rate` at which the block may learn by what was measured: above it the task loss
    on held-out rows suffered. None where nothing is known. `lopt-pp report` warns of runs above it where the objective
    ships with the program (`lopt_pp.config.objective.LOCAL_RATES`), and runs no code that a run's flags name."""

    needs_head_warmup: ClassVar[bool] = False
    """Whether that holds only with `--local_head_warmup_steps`."""

    summary: ClassVar[str] = "an objective of its own"
    """What the block learns from, for the model card: "each earlier block learned from ..."."""

    reads_weights: ClassVar[bool] = True
    """Whether the constructor looks at the values of weights of `site.block`, or of what `site.load` gives. If it does
    not, these are read straight to the device that trains them, and with `--sharding full` each replica holds its share
    only: no process then needs room for a whole stage in main memory or on its GPU."""

    weight: float = 1.0
    """What the mean loss is multiplied by before backward."""

    def __init__(self, site: Site | None = None) -> None:
        super().__init__()

    @abstractmethod
    def count(self, counts: TokenCounts) -> int:
        """Of the tokens of a step, the number that count. The step's sum is divided by it."""

    @abstractmethod
    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        """The loss of one microbatch.

        Args:
            output: of the block. `hidden_states` carries the gradient into the block, but not in the steps of
                `--local_head_warmup_steps`; `inputs`, what entered the first layer, is detached.
            batch: the token ids and labels, and the mask of the tokens that are not padding.

        Returns:
            The loss *summed* over the tokens that count, a float32 scalar. It is divided by the count of the whole
            optimizer step, so that a step's loss is the mean over its tokens however it is cut into microbatches.
        """

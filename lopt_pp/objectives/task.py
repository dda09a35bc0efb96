"""The task: what the last block learns from, and all blocks end to end.

Whatever needs the task's loss asks here for it: the last stage, the auxiliary networks of earlier ones, the end-to-end
pipeline, evaluation, and whoever names it. So a task that learns from something else than the next token is named here.
"""

from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.objectives.base import Objective
from lopt_pp.objectives.next_token import NextToken


def task_objective_class(config: ObjectiveConfig) -> type[Objective]:
    """The class of the task's loss: its name in metrics, and what of a step counts, before there is a block."""
    return NextToken


def task_objective(config: ObjectiveConfig) -> Objective:
    """The task's loss. It has no parameters: those that it trains are the block's, or the auxiliary network's."""
    return NextToken(config)

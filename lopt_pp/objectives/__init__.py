"""What each block learns from: the task on the last block, a local objective on the others.

Knows blocks and microbatches; no other stage, no optimizer, no processes.
Start at `base.py`, which says what an objective is. Each has its own file; `choice.py` finds the one that the flags
name.
"""

from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.objectives.auxiliary import AuxiliaryNextToken
from lopt_pp.objectives.base import Objective, Site
from lopt_pp.objectives.choice import (
    local_objective,
    local_objective_class,
    make_objective,
    nothing_to_load,
)
from lopt_pp.objectives.reconstruction import Reconstruction, reconstruction_head
from lopt_pp.objectives.task import CUDA_LOGITS, NextToken

__all__ = [
    "CUDA_LOGITS",
    "AuxiliaryNextToken",
    "NextToken",
    "Objective",
    "ObjectiveConfig",
    "Reconstruction",
    "Site",
    "local_objective",
    "local_objective_class",
    "make_objective",
    "nothing_to_load",
    "reconstruction_head",
]

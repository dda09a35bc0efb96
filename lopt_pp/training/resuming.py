"""`train(resume_from_checkpoint=...)` as `transformers` has it, which differs from the flag of that name."""

import os
from dataclasses import replace
from pathlib import Path

from lopt_pp.checkpoint.output_dir import LATEST, complete_checkpoints, holds_whole_model
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError


def resumed(config: Config, which: str | Path | bool | None) -> Config:
    """The config of a run that goes on from a checkpoint, as `transformers` names it in `train`."""
    if which is None or which is False:
        return config
    wanted = LATEST if which is True else os.path.expanduser(which)
    return replace(config, checkpoint=replace(config.checkpoint, resume_from_checkpoint=wanted))


def check_resumable(config: Config, world: World) -> None:
    """Sees that there is something to go on from. All processes must call this.

    Raises:
        LoptError: the output directory has neither a checkpoint nor a trained model.
    """
    path = Path(config.run.output_dir)
    if not world.from_rank_0("resumable", lambda: bool(complete_checkpoints(path)) or holds_whole_model(path)):
        raise LoptError(
            f"resume_from_checkpoint=True: no checkpoint in {path}; call train() without it to begin, or set the flag "
            f"resume_from_checkpoint to latest, which begins where there is none"
        )

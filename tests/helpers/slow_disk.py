"""The trainer, on a disk where no part of a checkpoint is whole before rank 1 has made 5 steps."""

import os
from collections.abc import Sequence
from pathlib import Path

from ranks import until

import lopt_pp.train
from lopt_pp.checkpoint import writer
from lopt_pp.training import checkpointing
from lopt_pp.training.checkpointing import Checkpointer


def main(arguments: Sequence[object]) -> int:
    """Trains: `[file that says when the disk is fast again, flags...]`."""
    released = Path(str(arguments[0]))
    checksum, after_step = writer.file_sha256, Checkpointer.after_step

    def slow(path: Path) -> str:
        until(released.exists)
        return checksum(path)

    def release(self: Checkpointer, steps_done: int) -> None:
        after_step(self, steps_done)
        if steps_done == 5 and os.environ["RANK"] == "1":
            released.touch()

    checkpointing._PATIENCE = 0.0
    writer.file_sha256 = slow
    Checkpointer.after_step = release  # type: ignore[method-assign]
    return lopt_pp.train.main([str(argument) for argument in arguments[1:]])

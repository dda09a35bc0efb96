"""The day on which a run began: that of its checkpoints, where it goes on from one."""

from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path

from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import LATEST, complete_checkpoints
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError

DAY = "day"
"""In a manifest's `run`, in ISO format."""


def run_day(world: World, which: str | None, output_dir: Path, today: Callable[[], date]) -> date:
    """The day of a run's start, the same in all processes whatever their clocks say. All must call this.

    Args:
        world: this process.
        which: the checkpoint that the run goes on from; `latest`; or None.
        output_dir: of the run, where the newest one is looked for.
        today: gives the day of a run that begins now.
    """
    day = world.from_rank_0("day", lambda: (_of_checkpoint(world, which, output_dir) or today()).isoformat())
    return date.fromisoformat(day)


def _of_checkpoint(world: World, which: str | None, output_dir: Path) -> date | None:
    """The day of the run that a checkpoint is of; whether the run can go on from it is seen later."""
    named = [Path(which)] if which not in (None, LATEST) else []
    there = complete_checkpoints(output_dir) if which == LATEST or world.is_restart else []
    found: list[tuple[float, date]] = []
    for path in there or named:
        # A damaged one is passed over here as it is then; another version's has no day.
        with suppress(LoptError, KeyError, TypeError, ValueError):
            manifest = read_manifest(path)
            found.append((manifest.committed or 0.0, date.fromisoformat(manifest.run[DAY])))
    return max(found)[1] if found else None

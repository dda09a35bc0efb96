"""When the stages of this process are saved in a run; `lopt_pp.checkpoint` does the writing."""

import functools
from collections.abc import Sequence
from pathlib import Path

from lopt_pp.checkpoint.best import best_checkpoint
from lopt_pp.checkpoint.output_dir import remove_unfinished_checkpoints
from lopt_pp.checkpoint.writer import Committer, PartWriter
from lopt_pp.distributed.world import World
from lopt_pp.metrics.collector import Collector
from lopt_pp.stage.base import BaseStage
from lopt_pp.training.setup import Setup


class Checkpointer:
    """Saves the stages of this process when a checkpoint is due, and on rank 0 makes the parts of all stages one.

    Args:
        setup: of the run.
        world: this process.
        stages: of this process.
        collector: of the run's records, on rank 0: it knows the losses on the held-out rows.
    """

    def __init__(self, setup: Setup, world: World, stages: Sequence[BaseStage], collector: Collector | None) -> None:
        self._config, self._num_steps = setup.config.checkpoint, setup.num_steps
        self._stages, self._steps_before = stages, stages[0].steps_done
        output_dir = Path(setup.config.run.output_dir)
        is_writer = setup.topology.replica_of(world.rank) == 0
        self._writer = PartWriter(output_dir, world.connection(), setup.topology.num_stages, is_writer)
        self._committer = None if collector is None else _committer(setup, world, output_dir, collector)

    def after_step(self, steps_done: int) -> None:
        """Saves the stages if a checkpoint is due when `steps_done` steps are done."""
        if steps_done < self._num_steps and self._config.saves_after(steps_done):
            self._save(steps_done)

    def after_last_step(self) -> None:
        """Saves the stages of a run that was asked to stop, unless they just were; waits until all parts are written.

        For after the last step that is made.
        """
        steps_done = self._stages[0].steps_done
        is_saved = steps_done == self._steps_before or self._config.saves_after(steps_done)
        if self._config.save_steps > 0 and steps_done < self._num_steps and not is_saved:
            self._save(steps_done)
        self._writer.finish()

    def join(self) -> None:
        """Waits, on rank 0, until the last checkpoint is made of its parts."""
        if self._committer is not None:
            self._committer.join()

    @property
    def committed(self) -> int | None:
        """The step of the newest checkpoint that was made, on rank 0; None before the first."""
        return None if self._committer is None else self._committer.committed

    def _save(self, steps_done: int) -> None:
        if self._committer is not None:
            self._committer.expect(steps_done)
        self._writer.save(self._stages, steps_done)


def _committer(setup: Setup, world: World, output_dir: Path, collector: Collector) -> Committer:
    keeps_best = setup.held_out is not None and setup.config.evaluation.load_best_model_at_end
    best_of = setup.held_out.digest if setup.held_out is not None and keeps_best else None
    remove_unfinished_checkpoints(output_dir)
    return Committer(
        output_dir,
        world.connection(),
        setup.specs,
        setup.must_match() | setup.may_change(),
        setup.write_description,
        setup.config.checkpoint.save_total_limit,
        eval_loss=collector.eval_loss if setup.held_out is not None else lambda step: None,
        best=functools.partial(best_checkpoint, output_dir, best_of) if best_of is not None else lambda: None,
    )

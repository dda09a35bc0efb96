"""When the stages of this process are saved in a run; `lopt_pp.checkpoint` does the writing.

A disk may be slower than checkpoints come due. Then one is skipped, by all stages and replicas: rank 0, which knows
whose parts are written, decides when it has made the step, and the others follow. So no process waits for a disk while
others wait for it in a collective or on a stream, and all parts of a checkpoint are there or none.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from lopt_pp.checkpoint.best import best_checkpoint, is_best
from lopt_pp.checkpoint.committer import Committer
from lopt_pp.checkpoint.lock import OutputLock
from lopt_pp.checkpoint.output_dir import remove_unfinished_checkpoints
from lopt_pp.checkpoint.run_day import DAY
from lopt_pp.checkpoint.writer import PartWriter, StageCopy
from lopt_pp.distributed.shutdown import EVALUATE, SAVE, RunLength
from lopt_pp.distributed.world import World
from lopt_pp.metrics.collector import Collector
from lopt_pp.stage.base import BaseStage
from lopt_pp.training.setup import Setup

logger = logging.getLogger(__name__)

_PATIENCE = 60.0
"""Seconds after a checkpoint has come due in which the next waits for its parts. Only then the disk counts as slow; a
run of short steps, which saves often, is to have its checkpoints."""


class Checkpointer:
    """Saves the stages of this process when a checkpoint is due, and on rank 0 makes the parts of all stages one.

    Args:
        setup: of the run.
        world: this process.
        stages: of this process.
        collector: of the run's records, on rank 0: it knows the losses on the held-out rows.
        run_id: of the run.
        lock: of the output directory, on rank 0.
        length: of the run.
    """

    def __init__(
        self,
        setup: Setup,
        world: World,
        stages: Sequence[BaseStage],
        collector: Collector | None,
        run_id: str,
        lock: OutputLock | None,
        length: RunLength,
    ) -> None:
        self._run, self._config, self._length = setup.config, setup.config.checkpoint, length
        self._only_best = self._config.only_best
        self._steps_per_epoch = setup.sampler(0).steps_per_epoch
        self._stages, self._steps_before = stages, stages[0].steps_done
        self._lock = lock
        self._store = world.connection()
        # A stage that waits here must not make its neighbours believe that it hangs.
        self._patience = min(_PATIENCE, setup.config.pipeline.stream_timeout / 4)
        self._saved = self._steps_before
        """The steps that the newest saved state has done."""
        self._last: Mapping[int, StageCopy] | None = None
        """Of the last step, until the model is saved."""
        output_dir = Path(setup.config.run.output_dir)
        is_writer = setup.topology.replica_of(world.rank) == 0
        self._takes_part = is_writer or any(stage.is_sharded for stage in stages)
        self._writer = PartWriter(output_dir, world.connection(), setup.topology.num_stages, is_writer)
        self._committer: Committer | None = None
        if collector is not None and lock is not None:
            self._committer = _committer(setup, world, output_dir, collector, run_id, lock, length)

    def after_step(self, steps_done: int) -> None:
        """Saves the stages if a checkpoint is due when `steps_done` steps are done; of the last one makes a copy only.

        Raises:
            LockLostError: another run has taken the output directory.
        """
        if self._lock is not None and self._lock.is_lost:
            self._lock.check()
        if self._length.is_last(steps_done):
            # The model comes first, so that a disk with room for one of the two gets the model.
            if self._config.saves and self._decide(steps_done, must=True):
                self._last = self._writer.copy(self._stages)
        elif self._is_due(steps_done) and self._decide(steps_done):
            self._save(steps_done, if_best=self._only_best and not self._is_asked(steps_done, SAVE))

    def _is_due(self, steps_done: int) -> bool:
        asked = SAVE | (EVALUATE if self._only_best else 0)
        return self._is_asked(steps_done, asked) or self._run.saves_after(steps_done, self._steps_per_epoch)

    def _is_asked(self, steps_done: int, what: int) -> bool:
        return self._config.saves and bool(self._length.besides(steps_done - 1) & what)

    def after_last_step(self) -> None:
        """Saves the stages of a run that is stopped, unless they just were; waits until this process's part is written.

        For after the last step that is made.
        """
        steps_done = self._stages[0].steps_done
        is_due = self._config.saves and steps_done < self._length.num_steps and steps_done != self._saved
        if is_due and self._decide(steps_done, must=True):
            self._save(steps_done)
        elif self._only_best and steps_done == self._saved and self._committer is not None:
            self._committer.expect(steps_done)  # Whatever its model is like: the run goes on from here.
        self._writer.finish()

    def after_model(self) -> None:
        """Saves what the stages had after the run's last step, once the model is in its place; waits until it is."""
        if self._last is not None:
            if self._committer is not None:
                self._committer.expect(self._length.num_steps)
            self._writer.write(self._last, self._length.num_steps)
            self._last = None
        self._writer.finish()
        self.join()

    def join(self) -> None:
        """Waits, on rank 0, until the last checkpoint is made of its parts."""
        if self._committer is not None:
            self._committer.join()

    @property
    def committed(self) -> int | None:
        """The step of the newest checkpoint that was made, on rank 0; None before the first."""
        return None if self._committer is None else self._committer.committed

    def _decide(self, step: int, must: bool = False) -> bool:
        """Whether this process saves what its stages have after `step` steps. Its writer is idle then.

        Args:
            step: that a checkpoint is due after.
            must: whether it waits for slow disks rather than skip a checkpoint: when no stage waits for its messages.
        """
        if not self._takes_part:
            return False
        key = f"checkpoint/{step}/{'last' if must else 'due'}"
        if self._committer is None:
            return self._store.get(key) == b"save"
        missing = self._committer.await_parts(None if must else self._patience, self._store)
        if missing:
            logger.warning("no checkpoint at step %d: %s (a slow disk?); the next is tried in time", step, missing)
        self._store.set(key, "skip" if missing else "save")
        return not missing

    def _save(self, steps_done: int, if_best: bool = False) -> None:
        self._saved = steps_done
        if self._committer is not None:
            self._committer.expect(steps_done, if_best)
        self._writer.save(self._stages, steps_done)


def _committer(
    setup: Setup,
    world: World,
    output_dir: Path,
    collector: Collector,
    run_id: str,
    lock: OutputLock,
    length: RunLength,
) -> Committer:
    held_out, criterion, config = setup.held_out, setup.criterion, setup.config
    best, more = None, {}
    keeps_best = config.evaluation.load_best_model_at_end or config.checkpoint.only_best
    if held_out is not None and criterion is not None and keeps_best:
        best = functools.partial(best_checkpoint, output_dir, run_id, held_out.digest, criterion)
        more = {"is_best": functools.partial(is_best, output_dir, run_id, held_out.digest, criterion)}
    remove_unfinished_checkpoints(output_dir)
    return Committer(
        output_dir,
        world.connection(),
        setup.specs,
        run_id,
        lock.check,
        setup.must_match() | setup.may_change() | {DAY: setup.day.isoformat()},
        setup.write_description,
        setup.config.checkpoint.save_total_limit,
        length,
        metrics=collector.measured if setup.held_out is not None else lambda step: {},
        best=best or (lambda: None),
        on_commit=collector.saved,
        **more,
    )

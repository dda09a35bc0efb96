"""What a run leaves in its output directory: its model, the last good weights, or word of where it was stopped."""

import json
import logging
import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from torch.distributed import Store

from lopt_pp.checkpoint.best import Measured, compare_with_start, load_best, rank_models
from lopt_pp.checkpoint.final_model import finish_model, keep_shards, save_stage
from lopt_pp.checkpoint.lock import OutputLock
from lopt_pp.checkpoint.manifest import note_unusable_rows
from lopt_pp.checkpoint.model_card import Effort
from lopt_pp.checkpoint.output_dir import STOPPED, ModelOrigin, is_checkpoint, remove_unfinished
from lopt_pp.data import UnusableRowsError
from lopt_pp.distributed.shutdown import RunLength, stop_reason
from lopt_pp.distributed.world import Failure, World
from lopt_pp.errors import LoptError, NotFiniteError, first_line
from lopt_pp.hub.pusher import Pusher
from lopt_pp.metrics.collector import Collector, post_end
from lopt_pp.metrics.records import FILE
from lopt_pp.metrics.run_info import note_early_finish
from lopt_pp.metrics.state import Activity, StateFile
from lopt_pp.stage.base import BaseStage
from lopt_pp.training.checkpointing import Checkpointer
from lopt_pp.training.publishing import card, effort_of
from lopt_pp.training.setup import Setup
from lopt_pp.util.console import print_error
from lopt_pp.util.files import write_text

logger = logging.getLogger(__name__)


def check_end(setup: Setup) -> None:
    """Makes, before the first step, what the end needs besides the weights. For rank 0.

    Raises:
        LoptError: something of it cannot be made, so that the whole run would be lost.
    """
    assert setup.description
    card(setup, [0] * setup.topology.num_stages)


_LOST = "they are lost, since --save_steps 0 turns checkpoints off"


class RunFinalizer:
    """One process's part of what a run leaves.

    Args:
        setup: of the run.
        world: this process.
        stages: of this process.
        run_id: of the run.
        lock: of the output directory, on rank 0.
        length: of the run.
        pusher: to the hub, on rank 0 of a run that is pushed there.

    Attributes:
        state: what tells, on rank 0 from before the first step, what the run is doing.
    """

    def __init__(
        self,
        setup: Setup,
        world: World,
        stages: Sequence[BaseStage],
        run_id: str,
        lock: OutputLock | None,
        length: RunLength,
        pusher: Pusher | None = None,
    ) -> None:
        self._run_id, self._lock, self._length, self._pusher = run_id, lock, length, pusher
        self._config, self._world, self._setup, self._stages = setup.config, world, setup, stages
        self._output_dir = Path(setup.config.run.output_dir)
        self._replica = setup.topology.replica_of(world.rank)
        self._measured: Measured | None = None
        self.state: StateFile | None = None

    def on_activity(self, activity: Activity, steps_done: int) -> None:
        """Tells what the run is doing from now on."""
        if self.state is not None:
            self.state.set(activity, steps_done)

    @property
    def steps_done(self) -> int:
        """By this process's stages."""
        return self._stages[0].steps_done

    def finish(self, collector: Collector | None, checkpointer: Checkpointer) -> None:
        """Leaves the model, and all of the log and the checkpoints. All must call this after the last step.

        Args:
            collector: of the run's records, on rank 0.
            checkpointer: of this process.

        Raises:
            LoptError: it cannot be written.
            PushError: it is written, and could not be pushed to the hub.
        """
        if collector is not None and self._length.is_early:
            post_end(self._world.store, self._length.num_steps)
        self._choose(collector, checkpointer)
        self._save(self._output_dir, self._world.store)
        if collector is not None and self._length.is_early:
            note_early_finish(self._output_dir / FILE, self._length.num_steps, stop_reason(self._world.store))
        checkpointer.after_model()
        if collector is not None:
            collector.join()
            if self._config.data.streaming:  # Only now it is known.
                logger.info("%s", self._setup.rows.summary())
            self._complete_card()
            self._say_how_it_went(collector)
        if self._pusher is not None:
            self._pusher.finish()
        if self.state is not None:
            self.state.end("finished", self.steps_done)

    def stop(
        self,
        steps_before: int,
        collector: Collector | None,
        checkpointer: Checkpointer,
        unusable: UnusableRowsError | None,
    ) -> None:
        """Brings log and checkpoint of a run that is stopped to their end. All must call this.

        Args:
            steps_before: that were done when the process began.
            collector: of the run's records, on rank 0.
            checkpointer: of this process.
            unusable: why the next step could not be made; None where the run was asked to stop.

        Raises:
            LoptError: rows cannot be used; or steps were done, and no checkpoint has them.
        """
        problem = ""
        if collector is not None:
            self._may_publish()
            post_end(self._world.store, self.steps_done)
            checkpointer.join()
            collector.join()
            is_saved = self.steps_done == steps_before or checkpointer.committed == self.steps_done
            if unusable is None:
                problem = self._leave_word(is_saved)
            else:
                problem = f"{unusable}{self._note_unusable(unusable, is_saved)}"
            if self._pusher is not None:
                self._pusher.wait()
        if problem := self._world.first_error("stopped", problem):
            raise LoptError(problem)

    def _leave_word(self, is_saved: bool) -> str:
        """Leaves word of where the run was stopped for whoever starts it again; returns what is wrong, if anything."""
        num_steps, saves = self._setup.num_steps, self._config.checkpoint.saves
        reason, done = stop_reason(self._world.store), f"{self.steps_done} of {num_steps} steps are done"
        if saves and not is_saved:
            return f"stopped by {reason}: {done}, but no checkpoint of them could be saved in time"
        stopped = {"step": self.steps_done, "num_steps": num_steps, "signal": reason}
        write_text(self._output_dir / STOPPED, json.dumps(stopped) + "\n")
        if self.state is not None:
            self.state.end("stopped", self.steps_done, reason)
        how = "--resume_from_checkpoint latest goes on from there" if is_saved else _LOST
        logger.warning("stopped by %s: %s; %s", reason, done, how)
        if is_checkpoint(checkpoint := self._output_dir / f"checkpoint-{self.steps_done}"):
            self._say_what_next(checkpoint)
        return ""

    def _note_unusable(self, unusable: UnusableRowsError, is_saved: bool) -> str:
        """Lets the run go on from its checkpoint once the rows are mended; returns how, for the end of their error."""
        if self.steps_done == 0:
            return ""
        done = f". {self.steps_done} of {self._setup.num_steps} steps are done"
        if not is_saved:
            saves = self._config.checkpoint.saves
            return f"{done}; {'no checkpoint of them could be saved' if saves else _LOST}"
        checkpoint = self._output_dir / f"checkpoint-{self.steps_done}"
        if is_checkpoint(checkpoint):
            note_unusable_rows(checkpoint, unusable.numbers, self._setup.rows.digest_without(unusable.numbers))
        return f"{done} and saved: mend the rows, and --resume_from_checkpoint latest goes on from there"

    def explain(self, error: NotFiniteError) -> NotFiniteError:
        """The error with where the weights from before that step are kept, if they are: see `abandon`."""
        # Replicas that hold a shard each would have to stop at the same step to give what they have.
        if any(stage.is_sharded for stage in self._stages):
            return error
        kept = f"{error}. The weights from before that step are kept in {self._last_good}"
        return NotFiniteError(kept, keeps_weights=True)

    @property
    def _last_good(self) -> Path:
        return self._output_dir / "last_good"

    def abandon(self, failure: Failure) -> None:
        """Saves what the stages have, where a loss somewhere was not finite, as an ordinary model to look into.

        Leaves nothing half-written. May be called from any thread.
        """
        if self._pusher is not None:
            self._pusher.abandon()
        if failure.keep:
            try:
                self._save(self._last_good, self._world.connection(timedelta(minutes=2)))
            except (RuntimeError, OSError, LoptError) as error:
                name = self._setup.topology.name_of(self._world.rank)
                print_error(f"{name}: the last good weights could not be saved: {error}")
        if self._lock is None or not self._lock.is_lost:
            remove_unfinished(self._output_dir)
        if self.state is not None:
            self.state.end("failed", self.steps_done, failure.message)

    def _may_publish(self) -> None:
        """Sees that no other run has taken the output directory; only rank 0 knows.

        Raises:
            LockLostError: one has.
        """
        if self._lock is not None:
            self._lock.check()

    def _choose(self, collector: Collector | None, checkpointer: Checkpointer) -> None:
        """Leaves the stages with the model that is to be saved: the last one, or the best. All must call this."""
        held_out, criterion = self._setup.held_out, self._setup.criterion
        if held_out is None:
            return
        if collector is not None:
            checkpointer.join()
            self._measured = Measured(collector.measured(self._length.num_steps), self._length.num_steps)
        if self._config.evaluation.load_best_model_at_end and criterion is not None:
            models: list[Measured] = []
            if self._measured is not None:
                models = rank_models(self._output_dir, self._run_id, held_out.digest, criterion, self._measured)
            self._measured = load_best(
                self._world,
                models,
                criterion,
                self._output_dir,
                self._stages,
                self._setup.specs,
                checks_parts=self._replica == 0,
            )
        if collector is not None and self._measured is not None:
            compare_with_start(collector.measured(0), self._measured, held_out.names)

    def _save(self, path: Path, store: Store) -> None:
        for stage in self._stages:
            save_stage(stage, path, store, is_writer=self._replica == 0, dtype=self._setup.given_dtype)
        if self._world.rank != 0:
            keep_shards(self._stages if self._replica == 0 else [], path, store)
            return
        setup = self._setup
        stages = setup.topology.num_stages
        finish_model(path, store, stages, setup.write_description, self._card, self._origin(), self._may_publish)

    def _origin(self) -> ModelOrigin:
        reason = stop_reason(self._world.store) if self._length.is_early else None
        return ModelOrigin(self._run_id, self._setup.num_steps, self._length.num_steps, reason)

    def _card(self, steps_done: Sequence[int], effort: Effort | None = None) -> str:
        repository = None if self._pusher is None else self._pusher.repository
        return card(self._setup, steps_done, self._measured, repository, effort, self._origin())

    def _complete_card(self) -> None:
        """Adds to the card what is known only when the records of all steps are there: what the training took."""
        num_stages = self._setup.topology.num_stages
        effort = effort_of(self._output_dir, num_stages - 1)
        text = self._card([self._length.num_steps] * num_stages, effort)
        try:
            write_text(self._output_dir / "README.md", text.encode("utf-8", "backslashreplace").decode())
        except OSError as error:  # It has a card.
            logger.warning("the model card does not say what the training took: %s", first_line(error))

    def _say_how_it_went(self, collector: Collector) -> None:
        minutes, seconds = divmod(round(collector.seconds), 60)
        logger.info("the model is in %s, after %d min %02d s of training", self._output_dir, minutes, seconds)
        for stage, time_shares in enumerate(collector.summary()):
            logger.info("stage %d: %s", stage, ", ".join(f"{share:.1%} {what}" for what, share in time_shares.items()))
        self._say_what_next(self._output_dir)

    def _say_what_next(self, model: Path) -> None:
        """Names the commands that show what has become of a model, or of a checkpoint."""
        chat, report = shlex.quote(str(model)), shlex.quote(str(self._output_dir))
        logger.info("lopt-pp chat %s talks to it; lopt-pp report %s shows how it learned", chat, report)

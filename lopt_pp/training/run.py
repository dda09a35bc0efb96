"""One process's part of a training run, from the flags to the saved model or to the checkpoint where it was stopped."""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lopt_pp.checkpoint.best import best_checkpoint
from lopt_pp.checkpoint.compatibility import essentials, settings
from lopt_pp.checkpoint.output_dir import (
    check_no_checkpoints,
    check_output_dir,
    forget_earlier,
    remove_checkpoints,
    remove_unfinished_checkpoints,
)
from lopt_pp.checkpoint.resume import LATEST, resume
from lopt_pp.checkpoint.writer import Committer, PartWriter
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.shutdown import NEVER_STOPS, StopCoordinator, StopSignal
from lopt_pp.distributed.world import World, check_shared
from lopt_pp.errors import NotFiniteError
from lopt_pp.metrics.begin import begin
from lopt_pp.metrics.collector import Collector
from lopt_pp.metrics.drift import Probe
from lopt_pp.metrics.records import Record
from lopt_pp.metrics.trackers import Listener, check_installed
from lopt_pp.objectives import NextToken, local_objective_class
from lopt_pp.pipeline.connect import boundaries
from lopt_pp.pipeline.stream import LocalStream, Receiver, Sender, StreamReceiver, StreamSender
from lopt_pp.stage.end_to_end_stage import EndToEndStage
from lopt_pp.stage.stage import Stage
from lopt_pp.training.finish import RunFinalizer
from lopt_pp.training.held_out import START
from lopt_pp.training.loop import train
from lopt_pp.training.setup import build_stages, prepare
from lopt_pp.training.step_messages import stream_headers

logger = logging.getLogger(__name__)


class Run:
    """One process's part of a training run.

    Args:
        config: the flags.
        world: this process.

    Raises:
        LoptError: something in the flags, the model or the data is unusable; nothing has been written then.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.output_dir = Path(config.run.output_dir)
        resumes = world.is_restart or config.checkpoint.resume_from_checkpoint == LATEST
        check_output_dir(self.output_dir, config.run.overwrite_output_dir, resumes)
        if world.rank == 0:
            check_installed(config.report)
        if not (config.run.overwrite_output_dir or resumes):
            check_no_checkpoints(self.output_dir, but=config.checkpoint.resume_from_checkpoint)
        self.setup = setup = prepare(config, world)
        self.topology, self.num_steps = setup.topology, setup.num_steps
        self.replica = self.topology.replica_of(world.rank)
        self.sampler, self.evaluation = setup.sampler(self.replica), setup.evaluation(self.replica)
        self._essentials = essentials(config, setup.model_config, setup.rows, self.topology.num_replicas)
        self._settings = settings(config, self.num_steps, setup.held_out)
        if world.rank == 0:
            forget_earlier(self.output_dir)
            self._say_what_it_is()
        self.stages, self.end_to_end = build_stages(setup, world)
        self.finalizer = RunFinalizer(config, world, setup, self._trained)
        self.probe = self._make_probe()
        if config.checkpoint.save_steps > 0 or resumes:
            why = "checkpoints need an --output_dir that all machines share, or --save_steps 0"
            check_shared(world, self.output_dir, why)
        self.steps_done = resume(
            world,
            config.checkpoint.resume_from_checkpoint,
            self.output_dir,
            self._trained,
            setup.specs,
            self.num_steps,
            self._essentials,
            self._settings,
            checks_parts=self.replica == 0,
        )
        if world.rank == 0 and config.run.overwrite_output_dir and not resumes:
            remove_checkpoints(self.output_dir, after=self.steps_done)

    def _say_what_it_is(self) -> None:
        setup = self.setup
        logger.info("%s", setup.rows.summary())
        if setup.held_out is not None:
            logger.info("evaluated on %s", setup.held_out.summary())
        cut = "; ".join(map(str, setup.specs))
        logger.info("%s, cut into %s; %d steps", setup.model_class.__name__, cut, self.num_steps)

    def _make_probe(self) -> Probe | None:
        """What measures the boundaries' drift, knowing the pretrained blocks; None where nothing can drift."""
        every = self.config.report.probe_steps
        if every == 0 or self._loss_names[0] is None or self.topology.num_stages == 1:
            return None
        limit = self.config.objective.max_interface_drift
        # All replicas have the same probe.
        probe = Probe(self.setup.sampler(0), every, self.topology.num_stages, math.inf if limit is None else limit)
        self.world.barrier("probe")  # All have loaded their blocks: nobody waits long for another.
        probe.remember(self.stages, self.topology, self.world.rank)
        return probe

    @property
    def _trained(self) -> Sequence[Stage | EndToEndStage]:
        """What this process trains."""
        return [self.end_to_end] if self.end_to_end is not None else self.stages

    def _checkpoints(self, collector: Collector | None) -> tuple[PartWriter, Committer | None]:
        """Writes this process's parts, and on rank 0 makes checkpoints of all."""
        writer = PartWriter(
            self.output_dir,
            self.world.connection(),
            self.topology.num_stages,
            is_writer=self.replica == 0,
        )
        if collector is None:
            return writer, None
        keeps_best = self.config.evaluation.load_best_model_at_end
        best_of = self.setup.held_out.digest if self.setup.held_out is not None and keeps_best else None
        remove_unfinished_checkpoints(self.output_dir)
        committer = Committer(
            self.output_dir,
            self.world.connection(),
            self.setup.specs,
            self._essentials | self._settings,
            self.setup.describe,
            self.config.checkpoint.save_total_limit,
            collector.eval_loss if self.setup.held_out is not None else lambda step: None,
            functools.partial(best_checkpoint, self.output_dir, best_of) if best_of else lambda: None,
        )
        return writer, committer

    def train(self) -> bool:
        """Trains the stages of this process, and leaves the model in the output directory.

        Returns:
            Whether the run came to its end; False where it was asked to stop, and has saved a checkpoint.

        Raises:
            NotFiniteError: a loss or a gradient is not finite; the stages have the weights from before that step.
            StreamError: a neighbour is gone, or disagrees.
            LoptError: the model, or the checkpoint of a run that was stopped, cannot be written.
        """
        facts = {
            "model_class": type(self._trained[0].block.model).__name__,
            "rows": self.setup.rows.summary(),
            "num_layers": self.setup.model_config.num_hidden_layers,
            "num_steps": self.num_steps,
            "steps_done_before": self.steps_done,
        }
        report, listeners = begin(self.world, self.config, self.topology, self._trained, self._loss_names, facts)
        collector = self._collector(listeners) if self.world.rank == 0 else None
        writer, committer = self._checkpoints(collector)

        def checkpoint(steps_done: int) -> None:
            if committer is not None:
                committer.expect(steps_done)
            writer.save(self._trained, steps_done)

        def after_step(steps_done: int) -> None:
            if steps_done < self.num_steps and self.config.checkpoint.saves_after(steps_done):
                checkpoint(steps_done)

        try:
            with self._deciding() as stop_signal:
                if self.end_to_end is not None:
                    assert stop_signal is not None
                    steps = itertools.takewhile(stop_signal.runs, self._steps)
                    self.end_to_end.train(self.sampler, steps, report, after_step, self.evaluation)
                else:
                    self._train_stages(stop_signal, report, after_step)
            steps_done = self._trained[0].steps_done
            saves = self.config.checkpoint.save_steps > 0 and not self.config.checkpoint.saves_after(steps_done)
            if saves and self.steps_done < steps_done < self.num_steps:
                checkpoint(steps_done)
            writer.finish()
        except NotFiniteError as error:
            if self.finalizer.keeps_last_good:
                error = NotFiniteError(
                    f"{error}. The weights from before that step are kept in {self.finalizer.last_good}"
                )
            raise error
        if steps_done < self.num_steps:
            if collector is not None and committer is not None:
                self.finalizer.stop(self.steps_done, steps_done, collector, committer)
            return False
        self.finalizer.finish(collector, committer)
        return True

    @property
    def _steps(self) -> range:
        """The steps that are to be made, unless the run is stopped, and maybe `START` before the first of all."""
        return range(START if self._evaluates_start else self.steps_done, self.num_steps)

    @property
    def _evaluates_start(self) -> bool:
        """Whether the pretrained model is evaluated before the first step."""
        return self.steps_done == 0 and self.evaluation is not None and self.evaluation.is_due(0)

    @contextmanager
    def _deciding(self) -> Iterator[StopCoordinator | None]:
        """The course of the run where this process decides it; None where the stream tells."""
        deciders = [self.topology.rank_of(0, replica) for replica in range(self.topology.num_replicas)]
        if self.end_to_end is not None:
            deciders = list(range(self.world.size))
        if self.world.rank not in deciders:
            yield None
            return
        stop_signal = StopCoordinator(self.world.connection(), self.world.rank, deciders, self.steps_done)
        try:
            yield stop_signal
        except BaseException:
            if self.world.size == 1:  # Where there are more, this process ends without waiting for its threads.
                stop_signal.close(self.world.store)
            raise
        stop_signal.close(self.world.store)

    def _train_stages(
        self, decided: StopSignal | None, report: Callable[[Record], None], after_step: Callable[[int], None]
    ) -> None:
        """Joins the stages of this process to their neighbours, and trains them."""
        pipeline = self.config.pipeline
        ends = boundaries(self.world, self.topology, pipeline.stream_timeout)
        stop_signal: StopSignal = decided or NEVER_STOPS
        receivers: dict[int, Receiver] = {}
        senders: dict[int, Sender] = {}
        for stage in self.stages:
            if stage.index - 1 in ends:
                headers = stream_headers(self.sampler, self._steps, stage, stage.index - 1, self.probe, self.evaluation)
                receiver = StreamReceiver(ends[stage.index - 1], headers, pipeline.queue_depth)
                stop_signal = receivers[stage.index] = receiver
            if stage.index in ends:
                headers = stream_headers(self.sampler, self._steps, stage, stage.index, self.probe, self.evaluation)
                senders[stage.index] = StreamSender(ends[stage.index], headers, pipeline.queue_depth, stop_signal)
            elif stage.index + 1 in self.topology.stages_of(self.world.rank):
                senders[stage.index] = receivers[stage.index + 1] = LocalStream()
        steps = itertools.takewhile(stop_signal.runs, self._steps)
        train(self.stages, receivers, senders, self.sampler, steps, report, after_step, self.probe, self.evaluation)

    @property
    def _loss_names(self) -> list[str | None]:
        """Of each stage; None where it has no loss."""
        local = local_objective_class(self.config.objective)
        earlier = None if local is None else local.name
        return [earlier] * (self.topology.num_stages - 1) + [NextToken.name]

    def _collector(self, listeners: Sequence[Listener]) -> Collector:
        return Collector(
            self.world.connection(),
            self.output_dir / "metrics.jsonl",
            self._loss_names,
            self.num_steps,
            self.config.run.logging_steps,
            self.topology.num_replicas,
            self.steps_done,
            listeners,
            self._evaluates_start,
        )

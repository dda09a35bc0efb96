"""What a run tells of itself while it goes on; `lopt_pp.metrics` does the measuring and writing."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from lopt_pp.distributed.shutdown import ask_to_finish
from lopt_pp.distributed.world import World
from lopt_pp.metrics.begin import Reporter, begin
from lopt_pp.metrics.collector import Collector
from lopt_pp.metrics.evaluations import Evaluations
from lopt_pp.metrics.history import log_history, read_records
from lopt_pp.metrics.installed import tracks
from lopt_pp.metrics.listeners import Listener, OwnCallbacks
from lopt_pp.metrics.logs import logs_after
from lopt_pp.stage.base import BaseStage
from lopt_pp.training.early_stopping import EarlyStopping
from lopt_pp.training.setup import Setup
from lopt_pp.training.step_plan import START

logger = logging.getLogger(__name__)


def open_reporting(
    setup: Setup,
    world: World,
    stages: Sequence[BaseStage],
    steps: range,
    run_id: str,
    own: OwnCallbacks | None = None,
    more: Sequence[Listener] = (),
) -> tuple[Reporter, Collector | None]:
    """Writes `run.json`, and opens the log, the trace and the trackers. All processes must call this.

    Args:
        setup: of the run.
        world: this process.
        stages: of this process.
        steps: that are to be made, and maybe `START` before them.
        run_id: of the run.
        own: the user's callbacks.
        more: that are told of each step, too.

    Returns:
        What reports a record of this process's to rank 0; and, on rank 0, what takes all of them.

    Raises:
        LoptError: a tracker that the flags ask for, or a callback, cannot begin.
    """
    steps_done, run, steps_per_epoch = max(steps.start, 0), setup.config.run, setup.sampler(0).steps_per_epoch
    run_info = {
        "run_id": run_id,
        "model_class": type(stages[0].block.model).__name__,
        "rows": setup.rows.summary(),
        "num_layers": setup.model_config.num_hidden_layers,
        "num_steps": setup.num_steps,
        "steps_done_before": steps_done,
    }
    report, listeners = begin(world, setup.config, setup.topology, stages, setup.loss_names, run_info)
    if world.rank != 0:
        return report, None
    if own is not None or tracks(setup.config.report):
        listeners.append(_open_callbacks(setup, world, run_id, steps_done, own))
    listeners += more
    return report, Collector(
        world.connection(),
        Path(run.output_dir) / "metrics.jsonl",
        setup.loss_names,
        setup.num_steps,
        lambda step: logs_after(step, run.logs_every(steps_per_epoch), run.logging_first_step, setup.num_steps),
        num_replicas=setup.topology.num_replicas,
        steps_done=steps_done,
        listeners=listeners,
        from_start=steps.start == START,
        evaluations=_evaluations(setup, world, steps_done),
        saves_after=lambda step: setup.config.saves_after(step, steps_per_epoch),
        shows_bar=not setup.config.report.disable_tqdm,
    )


def _open_callbacks(setup: Setup, world: World, run_id: str, steps_done: int, own: OwnCallbacks | None) -> Listener:
    """What calls trackers and callbacks, which have begun."""
    # Late, since they bring accelerate with them.
    from lopt_pp.metrics.arguments import as_training_arguments
    from lopt_pp.metrics.callbacks import Callbacks, called_as
    from lopt_pp.metrics.trackers import chosen, open_trackers

    config, evaluates = setup.config, setup.held_out is not None
    names = chosen(config.report)
    arguments = as_training_arguments(
        config, setup.num_steps, evaluates=evaluates, num_processes=world.size, reports_to=names
    )
    run = config.run
    steps_per_epoch = setup.sampler(0).steps_per_epoch
    every = run.logs_every(steps_per_epoch)
    called = open_trackers(names, config.report, arguments, run_id, steps_done)
    own = own or OwnCallbacks()
    callbacks = Callbacks(
        [*called, *map(called_as, own.callbacks)],
        arguments,
        setup.num_steps,
        steps_done,
        model=SimpleNamespace(config=setup.model_config),
        processing_class=setup.tokenizer,
        act=own.act,
        logs_every=every,
        steps_per_epoch=steps_per_epoch,
    )
    if steps_done:
        records = read_records(Path(run.output_dir) / "metrics.jsonl", steps_done)
        callbacks.remember(log_history(records, steps_done, every, run.logging_first_step))
    own.opened(callbacks)
    callbacks.begin()
    return callbacks


def _evaluations(setup: Setup, world: World, steps_done: int) -> Evaluations | None:
    """What keeps the run's evaluations, and has it finish early where the flags say so; None where there are none."""
    if setup.held_out is None:
        return None
    patience, criterion = setup.config.evaluation.early_stopping_patience, setup.criterion
    if patience is None or criterion is None:
        return Evaluations(steps_done, setup.held_out.names)
    if not setup.config.evaluation.load_best_model_at_end:
        logger.warning("--early_stopping_patience without --load_best_model_at_end saves the last model, not the best")
    finish = functools.partial(ask_to_finish, world.connection())
    stopping = EarlyStopping(criterion, patience, setup.config.evaluation.early_stopping_threshold, finish)
    return Evaluations(steps_done, setup.held_out.names, stopping.evaluated, stopping.remember)

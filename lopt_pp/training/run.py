"""A training run, from the flags to the saved model or to the checkpoint where it was stopped.

`run` reads from top to bottom: prepare, build the stages, resume, train, finish. Each process of a run calls it with
the same flags, and what all processes must take part in comes in the same order in all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lopt_pp.checkpoint.finished import is_finished, steps_of_model
from lopt_pp.checkpoint.lock import OutputLock, hold, refuse_if_held, this_holder
from lopt_pp.checkpoint.output_dir import LATEST, open_output_dir, remove_checkpoints, remove_leftovers
from lopt_pp.checkpoint.resume import find_start
from lopt_pp.checkpoint.run_day import run_day
from lopt_pp.config.train_config import Config
from lopt_pp.data.dates import today
from lopt_pp.distributed.shutdown import RunLength, stop_coordinator
from lopt_pp.distributed.world import World, check_shared
from lopt_pp.errors import LoptError, NotFiniteError
from lopt_pp.hub.repository import Repository
from lopt_pp.metrics.installed import check_installed
from lopt_pp.metrics.state import StateFile
from lopt_pp.model.in_memory import write_back
from lopt_pp.training.checkpointing import Checkpointer
from lopt_pp.training.connect import connect, deciders
from lopt_pp.training.finish import RunFinalizer, check_end
from lopt_pp.training.given import NOTHING, Given
from lopt_pp.training.loop import train
from lopt_pp.training.profiling import profile_path, profiled
from lopt_pp.training.publishing import open_pusher, repository_of
from lopt_pp.training.reporting import open_reporting
from lopt_pp.training.result import RunResult
from lopt_pp.training.setup import prepare
from lopt_pp.training.stages import build_stages, remember_pretrained, step_plan
from lopt_pp.training.step_plan import START
from lopt_pp.util.screen import shared


def run(
    config: Config,
    world: World,
    on_prepared: Callable[[RunFinalizer], None] = lambda finalizer: None,
    held: ExitStack | None = None,
    given: Given = NOTHING,
) -> RunResult:
    """Trains a model, and leaves it in the output directory. All processes of the run must call this.

    Args:
        config: the flags.
        world: this process.
        on_prepared: called before the first step, with what can save the weights when the run must be given up.
        held: is given the lock of the output directory, to let it go when it is closed; by default that is done when
            this returns or raises.
        given: objects of a script, in place of what flags would name. A model among them has the trained weights
            afterwards where this is the only process.

    Returns:
        How far it came. It is true where the run came to its end, or finished early; false where it was asked to stop,
        and has saved a checkpoint.

    Raises:
        NotFiniteError: a loss or a gradient is not finite; the stages have the weights from before that step.
        StreamError: a neighbour is gone, or disagrees.
        LoptError: something in the flags, the model or the data is unusable, another run has the output directory, or
            the checkpoint is another run's, and nothing has been written; rows of a step cannot be used, and what was
            done before it is saved; or the model, or the checkpoint of a run that was stopped, cannot be written.
        PushError: the model is there, and could not be pushed to the hub.
    """
    with ExitStack() as own:
        own.enter_context(shared())
        lock = (own if held is None else held).enter_context(_output_dir(config, world))
        return _run(config, world, lock, on_prepared, given)


@contextmanager
def _output_dir(config: Config, world: World) -> Iterator[OutputLock | None]:
    """Sees that the run can use its output directory, and on rank 0 holds its lock while the context lasts."""
    path, which, problem = Path(config.run.output_dir), config.checkpoint.resume_from_checkpoint, ""
    own = this_holder(world.launch, world.restart)
    if world.rank == 0:  # First, since what a living run has there would be taken for an earlier one's.
        try:
            refuse_if_held(path, own)
        except LoptError as error:
            problem = str(error)
    if problem := world.first_error("output_dir", problem):
        raise LoptError(problem)
    resumes = world.is_restart or which == LATEST
    open_output_dir(path, config.run.overwrite_output_dir, resumes, resumes_from=which)
    if world.rank != 0:
        yield None
        return
    with hold(path, own) as lock:
        yield lock


def _run(
    config: Config,
    world: World,
    lock: OutputLock | None,
    on_prepared: Callable[[RunFinalizer], None],
    given: Given,
) -> RunResult:
    # Prepare: what is wrong with the flags, the model or the rows comes out here, before anything is written.
    output_dir, which = Path(config.run.output_dir), config.checkpoint.resume_from_checkpoint
    overwrites, resumes = config.run.overwrite_output_dir, world.is_restart or which == LATEST
    repository: Repository | None = None
    if world.rank == 0:
        check_installed(config.report)
        repository = repository_of(config)
    setup = prepare(config, world, run_day(world, which, output_dir, today), given)
    world.barrier("prepared")  # What another process finds wrong comes before anything is written.
    if world.rank == 0:
        setup.log()
        check_end(setup)
    length = RunLength(setup.num_steps)
    pusher = open_pusher(setup, repository, length)

    # Find the checkpoint to go on from, if any: what it is not, the run must not replace.
    if config.checkpoint.saves or resumes:
        check_shared(world, output_dir, "checkpoints need an --output_dir that all machines share, or --save_steps 0")
    wanted = setup.wanted()
    own, is_first_replica = setup.topology.stages_of(world.rank), setup.topology.replica_of(world.rank) == 0
    start = find_start(world, wanted, own, setup.specs, checks_parts=is_first_replica)
    in_place = given.model if world.size == 1 else None
    finished = world.from_rank_0("finished", lambda: is_finished(start, wanted) and steps_of_model(wanted))
    if finished:
        if pusher is not None:  # It may not have come so far before.
            pusher.finish()
        if in_place is not None:
            trained = setup.model_class.from_pretrained(output_dir)
            write_back(in_place, dict(trained.named_parameters()), trained.config.tie_word_embeddings)
        return RunResult(True, finished, finished)
    if world.rank == 0:
        remove_leftovers(output_dir)
        if overwrites and which != LATEST:
            remove_checkpoints(output_dir, after=start.steps_done)

    # Build the stages of this process. The probe must see their pretrained weights, so it comes before a resume.
    world.say("loading the weights")
    stages = build_stages(setup, world, lambda stage: given.optimizer)
    probe = remember_pretrained(setup, world, stages)

    # Resume: afterwards all processes have done the same number of steps, none where the run is new.
    start.load(stages, setup.specs)
    steps_before = start.steps_done
    finalizer = RunFinalizer(setup, world, stages, start.run_id, lock, length, pusher)
    on_prepared(finalizer)

    # Train: every process does its part of each step, and waits for its neighbours only.
    plan = step_plan(setup, world, probe, length)
    evaluates_start = steps_before == 0 and config.evaluation.eval_on_start
    steps = range(START if evaluates_start else steps_before, setup.num_steps)
    more = [] if pusher is None else [pusher]
    report, collector = open_reporting(setup, world, stages, steps, start.run_id, given.callbacks, more)
    checkpointer = Checkpointer(setup, world, stages, collector, start.run_id, lock, length)
    if lock is not None:
        finalizer.state = StateFile(output_dir, steps_before, may_write=lambda: not lock.is_lost)
    try:
        with stop_coordinator(world, deciders(setup, world), steps_before, length) as decided:
            segment = connect(setup, world, stages, plan, steps, decided, length)
            path = profile_path(output_dir, setup.topology, world.rank)
            with profiled(steps, config.report.profile_window, path, world.device) as made:
                train(segment, plan, made, report, checkpointer.after_step, finalizer.on_activity, report.trained)
        finalizer.on_activity("saving", stages[0].steps_done)
        checkpointer.after_last_step()
    except NotFiniteError as error:
        raise finalizer.explain(error) from error

    # Finish: the model, or word of where the run was stopped.
    steps_done = stages[0].steps_done
    if length.is_last(steps_done):
        finalizer.finish(collector, checkpointer)
    else:
        finalizer.stop(steps_before, collector, checkpointer, plan.unusable(steps_done))
    if in_place is not None:
        trained_here = {name: own for stage in stages for name, own in stage.block.model.named_parameters()}
        write_back(in_place, trained_here, setup.builder.ties_embeddings)
    return RunResult(length.is_last(steps_done), steps_before, steps_done)

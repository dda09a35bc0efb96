"""Measures a model on held-out rows without training: what `Trainer.evaluate` does, by the stages of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import TrainerCallback, TrainerControl, TrainerState

from lopt_pp.config.train_config import Config
from lopt_pp.data.dates import today
from lopt_pp.data.in_memory import AnyRows, rows_of, sets_of
from lopt_pp.distributed.shutdown import NEVER_STOPS, RunLength
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError
from lopt_pp.metrics.collector import join_replicas
from lopt_pp.metrics.logs import evaluation_logs
from lopt_pp.metrics.records import Record
from lopt_pp.training.arguments import files_in_memory
from lopt_pp.training.connect import connect
from lopt_pp.training.given import Given
from lopt_pp.training.loop import train
from lopt_pp.training.requests import evaluates
from lopt_pp.training.setup import prepare
from lopt_pp.training.stages import build_stages, step_plan
from lopt_pp.training.step_plan import START


def on_rows(config: Config, given: Given, rows: AnyRows | Mapping[str, AnyRows]) -> tuple[Config, Given]:
    """A config and objects that say to evaluate on other rows than those of a run.

    Raises:
        LoptError: the rows cannot be read.
    """
    sets = sets_of(rows)
    if not sets:
        raise LoptError("eval_dataset is empty; give rows, or sets of them by their names")
    files = files_in_memory(list(sets))
    own = replace(config.evaluation, eval_file=files, eval_split_size=None, dataset_test_split=None)
    return replace(config, evaluation=own), replace(given, rows=replace(given.rows, held_out=rows_of(sets)))


def evaluate(config: Config, world: World, given: Given) -> dict[str, float]:
    """Measures a model on the held-out rows of a run, which is not begun. All processes must call this.

    Args:
        config: of the run; its model is what is measured.
        world: this process.
        given: objects of a script, in place of what flags would name.

    Returns:
        Numbers by name, as `on_evaluate` has them of the last stage: `eval_loss`, `eval_perplexity`, `eval_runtime`.

    Raises:
        LoptError: there are no such rows, or something in the flags, the model or the rows is unusable.
    """
    if not evaluates(config.evaluation):
        raise LoptError("there are no rows to evaluate on: give eval_dataset, or --eval_file")
    config = replace(config, evaluation=replace(config.evaluation, eval_on_start=True))
    setup = prepare(config, world, today(), given)
    assert setup.held_out is not None
    stages = build_stages(setup, world)
    length = RunLength(setup.num_steps)
    plan = step_plan(setup, world, None, length)
    # The step before the first, which trains nothing.
    steps, records = range(START, START + 1), list[Record]()
    segment = connect(setup, world, stages, plan, steps, NEVER_STOPS if setup.is_end_to_end else None, length)
    train(segment, plan, steps, records.append)
    last = setup.topology.num_stages - 1
    for record in records:
        if record["stage"] == last:
            own = {name: value for name, value in record.items() if name != "intervals"}
            world.store.set(f"evaluated/{setup.topology.replica_of(world.rank)}", json.dumps(own))
    replicas = [json.loads(world.store.get(f"evaluated/{n}")) for n in range(setup.topology.num_replicas)]
    return evaluation_logs([join_replicas(replicas, setup.held_out.names)])


def tell_of_evaluation(
    callbacks: Sequence[TrainerCallback], config: Config, state: TrainerState, metrics: Mapping[str, float]
) -> None:
    """Tells callbacks of an evaluation outside of a run. For rank 0."""
    from lopt_pp.metrics.arguments import as_training_arguments  # Late, since it brings accelerate with it.

    arguments = as_training_arguments(config, max(state.max_steps, 1), evaluates=True)
    for callback in callbacks:
        callback.on_evaluate(arguments, state, TrainerControl(), metrics=dict(metrics))

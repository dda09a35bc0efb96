"""What a run tells of itself while it goes on; `lopt_pp.metrics` does the measuring and writing."""

from collections.abc import Callable, Sequence
from pathlib import Path

from lopt_pp.distributed.world import World
from lopt_pp.metrics.begin import begin
from lopt_pp.metrics.collector import Collector
from lopt_pp.metrics.records import Record
from lopt_pp.stage.base import BaseStage
from lopt_pp.training.setup import Setup
from lopt_pp.training.step_plan import START


def open_reporting(
    setup: Setup, world: World, stages: Sequence[BaseStage], steps: range, run_id: str
) -> tuple[Callable[[Record], None], Collector | None]:
    """Writes `run.json`, and opens the log, the trace and the tracker. All processes must call this.

    Args:
        setup: of the run.
        world: this process.
        stages: of this process.
        steps: that are to be made, and maybe `START` before them.
        run_id: of the run.

    Returns:
        What reports a record of this process's to rank 0; and, on rank 0, what takes all of them.

    Raises:
        LoptError: the tracker that the flags ask for cannot begin.
    """
    steps_done = max(steps.start, 0)
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
    return report, Collector(
        world.connection(),
        Path(setup.config.run.output_dir) / "metrics.jsonl",
        setup.loss_names,
        setup.num_steps,
        setup.config.run.logging_steps,
        num_replicas=setup.topology.num_replicas,
        steps_done=steps_done,
        listeners=listeners,
        from_start=steps.start == START,
    )

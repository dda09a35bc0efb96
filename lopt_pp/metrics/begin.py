"""What a run does before its first step so that it can tell about itself."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopt_pp.config.topology import Topology
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.world import World
from lopt_pp.metrics.clock_sync import measure_offset
from lopt_pp.metrics.collector import post
from lopt_pp.metrics.listeners import Listener
from lopt_pp.metrics.mfu import device_peak, work_of
from lopt_pp.metrics.records import FILE, Record
from lopt_pp.metrics.run_info import about_stage, gather_about, write_about
from lopt_pp.metrics.trace import TraceFile
from lopt_pp.stage.base import BaseStage

logger = logging.getLogger(__name__)


def begin(
    world: World,
    config: Config,
    topology: Topology,
    stages: Sequence[BaseStage],
    loss_names: Sequence[str | None],
    run_info: Mapping[str, Any],
) -> tuple[Callable[[Record], None], list[Listener]]:
    """Joins the processes' clocks, writes `run.json`, and opens the trace. All must call this.

    Args:
        world: this process.
        config: the flags.
        topology: of the run.
        stages: of this process.
        loss_names: of all stages.
        run_info: what `run.json` is to say besides.

    Returns:
        What reports a record of this process's to rank 0; and, on rank 0, what is to be told of every step.
    """
    offset, replica = measure_offset(world), topology.replica_of(world.rank)
    accumulation = config.run.gradient_accumulation_steps
    peak = device_peak(world.device, config.stage.compute_dtype)
    works = {
        stage.index: work_of(stage.block, stage.objective, stage.learned_share(accumulation), peak) for stage in stages
    }

    def report(record: Record) -> None:
        post(world.store, replica, record | works[record["stage"]].utilization(record), offset.seconds)

    own = [about_stage(stage, works[stage.index], loss_names[stage.index]) for stage in stages]
    processes = gather_about(world, own, offset)
    if world.rank != 0:
        return report, []
    output_dir = Path(config.run.output_dir)
    name = config.report.run_name or output_dir.resolve().name
    about = {"name": name, **run_info, "layout": asdict(topology)}
    try:
        write_about(output_dir / FILE, about, config.flags(), processes)
    except OSError as error:
        logger.warning("%s cannot be written: %s. Training goes on", output_dir / FILE, error.strerror)
    listeners: list[Listener] = []
    if window := config.report.trace_window:
        layers = {stage["stage"]: stage["layers"] for process in processes for stage in process["stages"]}
        names = [f"stage {index}: layers {start}-{stop - 1}" for index, (start, stop) in sorted(layers.items())]
        clocks = {f"rank {process['rank']}": process["clock"] for process in processes}
        listeners.append(TraceFile(output_dir / "trace.json", window, names, about | {"clocks": clocks}))
    return report, listeners

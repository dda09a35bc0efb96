"""What a run does before its first step so that it can tell about itself."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed import Store

from lopt_pp.config.topology import Topology
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.world import World
from lopt_pp.metrics.clock_sync import measure_offset
from lopt_pp.metrics.collector import EVALUATED, IS_PART, post
from lopt_pp.metrics.listeners import Listener
from lopt_pp.metrics.mfu import Work, device_peak, work_of
from lopt_pp.metrics.records import FILE, Record
from lopt_pp.metrics.run_info import about_stage, gather_about, write_about
from lopt_pp.metrics.trace import TraceFile
from lopt_pp.stage.base import BaseStage

logger = logging.getLogger(__name__)


class Reporter:
    """Reports the records of this process's stages to rank 0.

    Args:
        store: of the run.
        replica: of this process.
        works: the arithmetic of each of its stages.
        clock_offset: seconds to add to this process's clock to get rank 0's.
    """

    def __init__(self, store: Store, replica: int, works: Mapping[int, Work], clock_offset: float) -> None:
        self._store, self._replica, self._works, self._clock_offset = store, replica, works, clock_offset
        self._trained: set[tuple[int, int]] = set()
        """The (stage, step) of records that have been told in part."""

    def __call__(self, record: Record) -> None:
        """Reports the record of a step."""
        stage, step = record["stage"], record["step"]
        part = EVALUATED if (stage, step) in self._trained else ""
        self._trained.discard((stage, step))
        utilization = self._works[stage].utilization(record)
        post(self._store, self._replica, record | utilization, self._clock_offset, part)

    def trained(self, record: Record) -> None:
        """Reports what a step's record has before the step's evaluation; the record follows."""
        self._trained.add((record["stage"], record["step"]))
        post(self._store, self._replica, record | {IS_PART: True})


def begin(
    world: World,
    config: Config,
    topology: Topology,
    stages: Sequence[BaseStage],
    loss_names: Sequence[str | None],
    run_info: Mapping[str, Any],
) -> tuple["Reporter", list[Listener]]:
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
    report = Reporter(world.store, replica, works, offset.seconds)
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

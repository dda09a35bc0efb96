"""Whether a run fits into its devices, and what would make it fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.topology import Topology
from lopt_pp.errors import LoptError
from lopt_pp.model.partition import BlockSpec, split_at, split_evenly
from lopt_pp.planning.balance import balance
from lopt_pp.planning.estimate import Model
from lopt_pp.planning.workload import Requirements, Workload

HEADROOM = 0.1
"""The share of a device's memory to leave: for the CUDA context, NCCL, cuBLAS and what the allocator cannot use."""

_MOST_REPLICAS, _MOST_STAGES = 8, 64


@dataclass(frozen=True)
class Layout:
    """A run, as far as its memory depends on it.

    Attributes:
        workload: of each process.
        pipeline: how the stages are laid over processes.
    """

    workload: Workload
    pipeline: PipelineConfig

    @property
    def topology(self) -> Topology:
        """Raises LoptError where stages and processes do not fit."""
        processes = self.pipeline.pipeline_processes or self.pipeline.num_stages
        return self.pipeline.topology(processes * self.workload.replicas)

    def specs(self, model: Model) -> tuple[BlockSpec, ...]:
        """The blocks: as the flags say, with operations in the place of timings.

        Raises:
            LoptError: the model has no such layers.
        """
        cuts = self.pipeline.boundaries
        if cuts is not None:
            return split_at(cuts, model.depth)
        if self.pipeline.split == "auto":
            return self.balanced(model)
        return split_evenly(model.depth, self.pipeline.num_stages)

    def balanced(self, model: Model) -> tuple[BlockSpec, ...]:
        """The blocks that make the busiest process do as few operations as it can, and then the busiest stage."""
        split_evenly(model.depth, self.pipeline.num_stages)  # Raises where there are too few layers.
        topology = self.topology
        return balance(
            model.costs(self.workload), [len(topology.stages_of(rank)) for rank in topology.ranks_of_replica(0)]
        )

    def processes(self, model: Model) -> list[tuple[Sequence[BlockSpec], Requirements]]:
        """Of one replica: what each process holds, in order, and what it needs."""
        specs, topology = self.specs(model), self.topology
        own = [[specs[stage] for stage in topology.stages_of(rank)] for rank in topology.ranks_of_replica(0)]
        return [(blocks, model.process(blocks, self.workload)) for blocks in own]

    def most(self, model: Model) -> int:
        """Bytes of the fullest process."""
        return max(requirements.memory.total for _, requirements in self.processes(model))


@dataclass(frozen=True)
class Remedy:
    """A change of flags, on top of those before it, with what the fullest process holds then, in bytes."""

    flags: str
    price: str
    total: int


def fits(total: int, memory: float) -> bool:
    """Whether so many bytes leave a device its headroom."""
    return total <= (1 - HEADROOM) * memory


def remedies(model: Model, layout: Layout, memory: float) -> tuple[list[Remedy], bool]:
    """Finds changes that make a run fit, each measured like the run itself: the cheapest first, each kept if it helps.

    Args:
        model: the model.
        layout: of a run that does not fit.
        memory: of a device, in bytes.

    Returns:
        The changes, in order, each on top of the others; and whether the run fits with all of them.
    """
    kept: list[Remedy] = []
    total = layout.most(model)
    for candidates in (_checkpointing, _narrower, _fewer_rows, _sharded, _deeper):
        for changed, flags, price in candidates(layout, model):
            try:
                needed = changed.most(model)
            except LoptError:  # Such as one stage more than there are layers.
                break
            if needed >= total:
                break
            # Of one kind the last is the one that stays: a smaller batch, more stages.
            kept = [remedy for remedy in kept if remedy.price != price] + [Remedy(flags, price, needed)]
            layout, total = changed, needed
            if fits(total, memory):
                return kept, True
    return kept, False


_Candidates = Iterator[tuple[Layout, str, str]]
"""Changed layouts, each with its flags and what it costs."""


def _with_stage(layout: Layout, **changes: object) -> Layout:
    return replace(layout, workload=replace(layout.workload, stage=replace(layout.workload.stage, **changes)))  # type: ignore[arg-type]


def _checkpointing(layout: Layout, model: Model) -> _Candidates:
    if not layout.workload.stage.gradient_checkpointing:
        changed = _with_stage(layout, gradient_checkpointing=True)
        yield changed, "--gradient_checkpointing true", "a second forward of the layers"


def _narrower(layout: Layout, model: Model) -> _Candidates:
    if layout.workload.stage.dtype == "float32":
        yield _with_stage(layout, dtype="bfloat16"), "--dtype bfloat16", "products in bfloat16"


def _fewer_rows(layout: Layout, model: Model) -> _Candidates:
    """Halves the rows of a microbatch; a step keeps as many."""
    workload = layout.workload
    while workload.rows % 2 == 0:
        workload = replace(workload, rows=workload.rows // 2, accumulation=2 * workload.accumulation)
        flags = f"--per_device_train_batch_size {workload.rows} --gradient_accumulation_steps {workload.accumulation}"
        if (learned := workload.objective.local_accumulation_steps) is not None:
            workload = replace(workload, objective=replace(workload.objective, local_accumulation_steps=2 * learned))
            flags += f" --local_accumulation_steps {2 * learned}"
        changed = replace(layout, workload=workload)
        yield changed, flags, "smaller microbatches, more of them"


def _sharded(layout: Layout, model: Model) -> _Candidates:
    replicas = layout.workload.replicas if layout.workload.sharding == "none" else 2 * layout.workload.replicas
    replicas = max(replicas, 2)
    while replicas <= _MOST_REPLICAS:
        changed = replace(
            layout,
            workload=replace(layout.workload, replicas=replicas, sharding="full"),
            pipeline=replace(layout.pipeline, data_parallel=replicas, sharding="full"),
        )
        yield changed, f"--data_parallel {replicas} --sharding full", "more devices, and traffic among replicas"
        replicas *= 2


def _deeper(layout: Layout, model: Model) -> _Candidates:
    stages = 2 * layout.pipeline.num_stages
    while stages <= min(_MOST_STAGES, model.depth):
        split = layout.pipeline.split if layout.pipeline.boundaries is None else "midpoint"
        changed = replace(
            layout, pipeline=replace(layout.pipeline, num_stages=stages, split=split, pipeline_processes=None)
        )
        yield changed, f"--num_stages {stages}", "more devices, and shorter blocks"
        stages *= 2

"""Whether a layout gives the weights that one process gives: of stages, of replicas, of both."""

from dataclasses import dataclass

from lopt_pp.checks.result import Figures
from lopt_pp.checks.session import Session
from lopt_pp.checks.training import compare, train, train_alone
from lopt_pp.config.topology import Topology


@dataclass(frozen=True)
class Exactness:
    """A layout in all processes against one process.

    Attributes:
        name: of the check.
        topology: the layout.
        flags: of both runs.
        layout_flags: of the run in the layout.
        accumulation: microbatches of a step in each replica.
    """

    name: str
    topology: Topology
    flags: tuple[str, ...] = ()
    layout_flags: tuple[str, ...] = ()
    accumulation: int = 1

    def __call__(self, session: Session) -> Figures:
        alone = train_alone(session, self.topology, *self.flags, accumulation=self.accumulation)
        steps = ("--gradient_accumulation_steps", str(self.accumulation))
        name = self.name.replace(" ", "-")
        ran = train(session, name, self.topology, *self.flags, *self.layout_flags, *steps).succeeded()
        return session.leader_says(lambda: compare(alone, ran.folder / "out"))


def layouts(asked: Topology) -> list[Exactness]:
    """The layout that is asked for, and each other kind that fits into as many processes."""
    size = asked.world_size
    chain, deeper = Topology(size, size), Topology(max(asked.num_stages, size) + 2, size)
    checks = [
        Exactness(f"exactness: {in_words(asked)}", asked),
        # A stage that sends and receives, steps of several microbatches, and a queue longer than a step.
        Exactness(f"exactness: {in_words(deeper)}", deeper, (), ("--queue_depth", "5"), accumulation=3),
        Exactness(f"exactness: frozen, {in_words(asked)}", asked, ("--method", "frozen")),
        Exactness(f"exactness: end to end, {in_words(chain)}", chain, ("--method", "e2e")),
    ]
    grids = [Topology(1, 1, size)] + ([Topology(2, 2, size // 2)] if size >= 4 and size % 2 == 0 else [])
    for grid in grids:
        for kind, sharding in (("DDP", "none"), ("FSDP2", "full")):
            checks.append(Exactness(f"exactness: {in_words(grid)}, {kind}", grid, (), ("--sharding", sharding)))
    return checks


def in_words(topology: Topology) -> str:
    """Such as `4 stages in 2 processes, 2 replicas`."""
    stages, processes, replicas = topology.num_stages, topology.num_processes, topology.num_replicas
    words = f"{stages} stage{'s' if stages > 1 else ''}"
    words += f" in {processes} processes" if processes not in (1, stages) else ""
    return words + (f", {replicas} replicas" if replicas > 1 else "")

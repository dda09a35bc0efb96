"""Which process of a pipeline holds which stages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """The stages of a pipeline, laid over its processes in order, and the pipeline's replicas.

    The replicas of a stage have neighbouring ranks, so that they share a machine where they can, and a boundary between
    machines is crossed once by each replica's stream.

    Args:
        num_stages: blocks of the model.
        num_processes: of one replica of the pipeline, 1 to `num_stages`.
        num_replicas: of the pipeline.
    """

    num_stages: int
    num_processes: int
    num_replicas: int = 1

    @property
    def world_size(self) -> int:
        return self.num_processes * self.num_replicas

    def ranks_of_replica(self, replica: int) -> range:
        """The processes of a replica, in the order of their stages."""
        return range(replica, self.world_size, self.num_replicas)

    def replica_of(self, rank: int) -> int:
        """The replica that process `rank` belongs to."""
        return rank % self.num_replicas

    def stages_of(self, rank: int) -> range:
        """The stages that process `rank` holds."""
        position = rank // self.num_replicas
        first, stop = (self.num_stages * p // self.num_processes for p in (position, position + 1))
        return range(first, stop)

    def rank_of(self, stage: int, replica: int = 0) -> int:
        """The process of `replica` that holds `stage`."""
        position = next(p for p in range(self.num_processes) if stage in self.stages_of(p * self.num_replicas))
        return position * self.num_replicas + replica

    def name_of(self, rank: int) -> str:
        """Process `rank` in messages, such as `stage 0 (rank 0)` or `stages 2, 3 of replica 1 (rank 3)`."""
        stages = self.stages_of(rank)
        replica = f" of replica {self.replica_of(rank)}" if self.num_replicas > 1 else ""
        return f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}{replica} (rank {rank})"

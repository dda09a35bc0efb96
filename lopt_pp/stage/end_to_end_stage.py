"""One process's part of an end-to-end run: a block of the pipeline with its optimizer."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import Microbatch
from lopt_pp.errors import NotFiniteError
from lopt_pp.model.block import BlockModel
from lopt_pp.objectives import Objective, ObjectiveConfig
from lopt_pp.stage.base import BaseStage, Clock, Measure, check_finite, untimed
from lopt_pp.stage.data_parallel import Replicas, Replicated
from lopt_pp.stage.end_to_end import EndToEndPipeline, clip_grad_norm
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.optimizer_kinds import OptimizerFactory, ParameterFacts


class EndToEndStage(BaseStage):
    """One process's block of a model that is trained end to end across processes (1F1B), with its optimizer.

    Args:
        block: the block, with its weights.
        optim: learning rate and the optimizer; all blocks have the last one's rate.
        num_steps: of the whole run, for the schedule of the rate.
        group: the pipeline's processes.
        config: how the block computes.
        objective: says what the task's loss is.
        seed: of the run.
        device: where the block lives.
        replicas: of the pipeline; None if there is only this one.
        optimizer_factory: makes the optimizer in the place of the one that `optim` names.
    """

    optimizer: Optimizer

    def __init__(
        self,
        block: BlockModel,
        optim: OptimConfig,
        num_steps: int,
        group: dist.ProcessGroup,
        *,
        config: StageConfig,
        objective: ObjectiveConfig,
        seed: int,
        device: torch.device,
        replicas: Replicas | None,
        optimizer_factory: OptimizerFactory | None = None,
    ) -> None:
        super().__init__(block, device)
        self.replicas = replicas
        self._group = group
        self._pipeline = EndToEndPipeline(
            [block], group, device, config=config, objective=objective, seed=seed, replicas=replicas
        )
        self._max_grad_norm = optim.max_grad_norm
        self.optimizer = Optimizer(
            block.parameters(),
            optim,
            optim.learning_rate,
            num_steps,
            facts=ParameterFacts.of({"block": block.model}),
            factory=optimizer_factory,
        )
        self.side.changed()

    @property
    def task(self) -> Objective | None:
        return self._pipeline.task

    def train_step(
        self, step: int, batches: Sequence[Microbatch], num_targets: int, clock: Clock = untimed
    ) -> dict[str, float]:
        """One optimizer step, together with the other processes of the pipeline, which must all call this.

        Args:
            step: from 0.
            batches: the microbatches of the step, on the CPU, the same in every process of the pipeline.
            num_targets: target tokens of the whole step, over all replicas.
            clock: times the phases `schedule` and `optimizer`.

        Returns:
            The gradient norm over the whole model (before clipping) and the learning rate; in the process of the last
            block also `loss`, this replica's share of the step's mean loss.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; the weights are those of the last good step.
        """
        with clock("schedule"):
            loss = self._pipeline.step(batches, num_targets)
        with clock("optimizer"):
            total = clip_grad_norm(self.optimizer.parameters, self._max_grad_norm, self._group)
            # The step's only wait for the device.
            norm, *losses = torch.stack([total, *([] if loss is None else [loss.to(total)])]).tolist()
            record = self.router_record() | {"grad_norm": norm, "learning_rate": self.optimizer.learning_rate}
            if losses:
                (record["loss"],) = losses
                if not math.isfinite(record["loss"]):
                    raise NotFiniteError(f"the loss of step {step + 1} is {record['loss']}; lower the learning rate")
            check_finite(self.index, step, {}, norm)
            self.update({module: True for module in self._pipeline.wrapped if isinstance(module, Replicated)})
        return record

    def evaluate(self, batches: Iterable[Microbatch], measure: Measure | None = None) -> list[torch.Tensor]:
        """Runs microbatches forward. All processes of the pipeline must call this.

        Args:
            batches: on the CPU, the same in every process of the pipeline.
            measure: makes their loss, in place of the task's.

        Returns:
            The loss of each, summed over its target tokens, in the process that holds the last block.
        """
        with self.averaged():
            return self._pipeline.evaluate(batches, measure)

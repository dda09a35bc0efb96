"""One process's part of an end-to-end run: a block of the pipeline with its optimizer, and the loop that trains it."""

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import Microbatch, MicrobatchSampler
from lopt_pp.errors import NotFiniteError
from lopt_pp.metrics.clock import StageClock, peak_memory
from lopt_pp.metrics.records import Record
from lopt_pp.model.block import BlockModel
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.stage.end_to_end import EndToEndPipeline, clip_grad_norm
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.stage import check_norm
from lopt_pp.stage.state import read_state, write_state
from lopt_pp.training.held_out import START, Evaluation, mean_loss
from lopt_pp.training.loop import token_counts


class EndToEndStage:
    """One process's block of a model that is trained end to end across processes (1F1B), with its optimizer.

    Args:
        block: the block, with its weights.
        optim: learning rate and AdamW; all blocks have the last one's rate.
        num_steps: of the whole run, for the schedule of the rate.
        group: the pipeline's processes.
        config: how the block computes.
        seed: of the run.
        device: where the block lives.
        replicas: of the pipeline; None if there is only this one.
    """

    is_sharded = False

    def __init__(
        self,
        block: BlockModel,
        optim: OptimConfig,
        num_steps: int,
        group: dist.ProcessGroup,
        *,
        config: StageConfig,
        seed: int,
        device: torch.device,
        replicas: Replicas | None,
    ) -> None:
        self.block = block
        self.index = block.spec.stage
        self.device = device
        self.steps_done = 0
        self.updating = threading.Lock()
        self._group = group
        self._pipeline = EndToEndPipeline([block], group, device, config=config, seed=seed, replicas=replicas)
        self._max_grad_norm = optim.max_grad_norm
        self._optimizer = Optimizer(block.parameters(), optim, optim.learning_rate, num_steps)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of all that the next step depends on."""
        return read_state({"block": self.block.model}, self._optimizer)

    def resume(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Goes on from what `state` gave after `steps_done` steps.

        Raises:
            LoptError: it is another stage's.
        """
        write_state(state, {"block": self.block.model}, self._optimizer, steps_done)
        self.steps_done = steps_done

    def resume_weights(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Goes on from the weights among other stages' `state`, with an optimizer that starts anew.

        Raises:
            LoptError: a tensor of this stage is missing or of another shape.
        """
        write_state(state, {"block": self.block.model}, None, steps_done)
        self._optimizer.resume({}, steps_done)
        self.steps_done = steps_done

    def train(
        self,
        sampler: MicrobatchSampler,
        steps: Iterable[int],
        report: Callable[[Record], None],
        after_step: Callable[[int], None] = lambda steps_done: None,
        evaluation: Evaluation | None = None,
    ) -> None:
        """Trains for some optimizer steps, together with the other processes.

        Args:
            order: of the data, the same in every process of the pipeline.
            steps: of the run, to make, the same in all processes; may end early. The first may be `START`, of which
                there is only the evaluation.
            report: called with one record per step, see `docs/metrics.md`.
            after_step: called with the number of steps done.
            evaluation: rows to measure the model on between steps; the same in every process of the pipeline.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; the weights are those of the last good step.
        """
        clock = StageClock(self.device)
        for step in steps:
            batches: Sequence[Microbatch] = ()
            record: Record = {}
            if step != START:
                batches = sampler.microbatches(step)
                with clock("schedule"):
                    loss = self._pipeline.step(batches, sampler.counts(step).num_targets)
                with clock("optimizer"):
                    record = self._step(step, loss)
            if evaluation is not None and evaluation.is_due(step + 1):
                with clock("eval"):
                    losses = self._pipeline.evaluate(evaluation.microbatches())
                if losses:
                    record["eval_loss"] = mean_loss(losses, evaluation.counts.num_targets)
            record |= clock.read()
            record |= {"step": step + 1, "stage": self.index, "epoch": sampler.epoch(step)}
            record |= token_counts(batches) | {"peak_memory_bytes": peak_memory(self.device)}
            report(record)
            if step != START:
                after_step(step + 1)

    def _step(self, step: int, loss: torch.Tensor | None) -> Record:
        norm = clip_grad_norm(self._optimizer.parameters, self._max_grad_norm, self._group).item()
        record: Record = {"grad_norm": norm, "learning_rate": self._optimizer.learning_rate}
        if loss is not None:
            record["loss"] = loss.item()
            if not math.isfinite(record["loss"]):
                raise NotFiniteError(f"the loss of step {step + 1} is {record['loss']}; lower the learning rate")
        check_norm(norm, self.index, step)
        with self.updating:
            self._optimizer.step()
            self.steps_done += 1
        return record

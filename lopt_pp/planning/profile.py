"""Times the parts of a model on this process's device."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec
from lopt_pp.model.verify_positions import trained_positions
from lopt_pp.objectives import local_objective
from lopt_pp.planning.costs import Costs, layer_kinds
from lopt_pp.planning.synthetic import random_microbatch
from lopt_pp.stage.compute import prepare_objective
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.stage import Stage

_REPETITIONS = 5


def measure(
    builder: BlockBuilder,
    shape: tuple[int, int],
    accumulation: int,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    stage: StageConfig,
    device: torch.device,
) -> Costs:
    """Times the parts of a model on this process's device: stages of one layer, with random weights.

    Layers of one kind (the same tensors, the same entry in each of the config's lists) are timed once.

    Args:
        builder: of the model's blocks.
        shape: (sequences, tokens) of a microbatch.
        accumulation: microbatches of an optimizer step.
        objective: what stages learn from.
        optim: the optimizer.
        stage: how stages compute.
        device: to measure on.
    """
    timer = _Timer(builder, shape, optim, stage, device)
    # Whatever blocks learn from, their layers cost the same, which is measured with the cheapest objective.
    plain = replace(objective, method="lopt", local_objective="reconstruction", local_accumulation_steps=None)
    frozen = replace(plain, method="frozen")
    depth = builder.config.num_hidden_layers

    layers, head = timer.learning_layers(plain, accumulation)
    output = max(timer.stage(BlockSpec(1, 2, depth - 1, depth), plain, accumulation) - layers[-1], 0.0)
    if objective.local == "none":
        forward_only = timer.layers(frozen, accumulation)
        return Costs(tuple(layers), tuple(forward_only), embedding=0.0, local_head=0.0, output=output)
    learned = objective.num_learned(accumulation)
    share, own, earlier = learned / accumulation, layers, layers
    if share < 1:  # A step of the optimizer goes with fewer microbatches; the others are run forward.
        own, head = timer.learning_layers(plain, learned)
        forward_only = timer.layers(frozen, accumulation)
        earlier = [share * layer + (1 - share) * less for layer, less in zip(own, forward_only, strict=True)]
    return Costs(
        layers=tuple(layers),
        earlier_layers=tuple(earlier),
        embedding=share * max(timer.stage(BlockSpec(0, 2, 0, 1), plain, learned) - own[0] - head, 0.0),
        local_head=share * (head if objective == plain else timer.local_head(objective, learned)),
        output=output,
    )


class _Timer:
    """Times parts of a model with random weights, on random microbatches; all times are seconds per microbatch.

    Arguments as for `measure`.
    """

    def __init__(
        self,
        builder: BlockBuilder,
        shape: tuple[int, int],
        optim: OptimConfig,
        stage: StageConfig,
        device: torch.device,
    ) -> None:
        self._builder, config = builder, builder.config
        self._optim, self._stage, self._device = optim, stage, device
        self._batch = random_microbatch(shape, config.vocab_size, device, trained_positions(config))
        self._received = torch.randn(*shape, config.hidden_size, device=device, dtype=stage.compute_dtype)
        self._kinds = layer_kinds(builder.model_class, config, builder.structure)

    def stage(self, spec: BlockSpec, objective: ObjectiveConfig, accumulation: int) -> float:
        """Of a whole stage."""
        block = self._make_block(spec, objective)
        own = local_objective(block, objective, seed=0)
        timed = Stage(block, own, self._optim, num_steps=10**6, config=self._stage, device=self._device)

        def microbatch() -> None:
            timed.run_microbatch(
                self._batch,
                None if spec.is_first else self._received,
                lambda hidden_states: None,
                step_count=self._batch.num_tokens if timed.learns else None,
            )

        return self._seconds(microbatch, lambda: timed.step(0), accumulation)

    def local_head(self, objective: ObjectiveConfig, accumulation: int) -> float:
        """Of the loss of an earlier stage, which is taken to end in the middle of the model."""
        middle = max(self._builder.config.num_hidden_layers // 2, 1)
        workload = functools.partial(self._make_block, objective=objective)
        head = local_objective(workload(BlockSpec(1, 3, middle - 1, middle)), objective, seed=0, load=workload)
        if head is None:
            return 0.0
        prepare_objective(head, self._stage, self._device)
        parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
        optimizer = Optimizer(parameters, self._optim, 0.0, num_steps=10**6) if parameters else None
        hidden_states = self._received.detach().to(self._stage.parameter_dtype).requires_grad_()

        def microbatch() -> None:
            with torch.autocast(self._device.type, self._stage.compute_dtype, enabled=self._stage.autocasts):
                loss = head(BlockOutput(self._received, hidden_states, None), self._batch)
            loss.backward()

        return self._seconds(microbatch, optimizer.step if optimizer else lambda: None, accumulation)

    def layers(self, objective: ObjectiveConfig, accumulation: int) -> list[float]:
        """Of a stage of one layer, for each layer; those of one kind are timed once."""
        specs = {kind: BlockSpec(1, 3, number, number + 1) for number, kind in enumerate(self._kinds)}
        of_kind = {kind: self.stage(spec, objective, accumulation) for kind, spec in specs.items()}
        return [of_kind[kind] for kind in self._kinds]

    def learning_layers(self, objective: ObjectiveConfig, accumulation: int) -> tuple[list[float], float]:
        """Of the layers alone, and of the head that they are measured with."""
        head = self.local_head(objective, accumulation)
        return [max(layer - head, 0.0) for layer in self.layers(objective, accumulation)], head

    def _make_block(self, spec: BlockSpec, objective: ObjectiveConfig) -> BlockModel:
        block = self._builder.with_random_weights(spec)
        if not objective.train_embeddings:
            block.freeze_embeddings()
        return block

    def _seconds(self, microbatch: Callable[[], object], step: Callable[[], object], accumulation: int) -> float:
        """The median seconds of a microbatch with its share of a step."""
        times: list[tuple[float, float]] = []
        for _ in range(1 + _REPETITIONS):  # The first one allocates, and compiles.
            begun = self._now()
            microbatch()
            between = self._now()
            step()
            times.append((between - begun, self._now() - between))
        computing, stepping = (statistics.median(column) for column in zip(*times[1:], strict=True))
        return computing + stepping / accumulation

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

"""What the parts of a model cost: timed, or computed."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.computation import StageConfig, prepare_objective
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.optim import OptimConfig, Optimizer
from lopt_pp.span import Span
from lopt_pp.split import Anatomy, BlockModel, BlockOutput
from lopt_pp.stage import Stage
from lopt_pp.stand_ins import random_block, random_microbatch

_REPETITIONS = 5


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a model take for a microbatch: forward, backward and their share of the optimizer step.

    Attributes:
        layers: of each decoder layer, on the last stage.
        earlier_layers: the same on an earlier stage, which may only run forward, always or in some microbatches.
        embedding: of what comes before the layers.
        local_head: of an earlier stage's own loss, with its head or auxiliary network.
        output: of the final norm, the output head and the task loss.
    """

    layers: tuple[float, ...]
    earlier_layers: tuple[float, ...]
    embedding: float
    local_head: float
    output: float

    def of(self, start: int, stop: int, num_local_heads: int) -> float:
        """Of the layers `start` to `stop - 1`, with what stands before or after them, and local heads among them."""
        is_last = stop == len(self.layers)
        ends = (self.embedding if start == 0 else 0.0) + (self.output if is_last else 0.0)
        layers = self.layers if is_last else self.earlier_layers
        return sum(layers[start:stop]) + ends + num_local_heads * self.local_head

    def __str__(self) -> str:
        lowest, highest = (1e3 * end(*self.layers, *self.earlier_layers) for end in (min, max))
        layer = f"{lowest:.1f}" if highest == lowest else f"{lowest:.1f} to {highest:.1f}"
        return (
            f"a layer {layer} ms, the embedding {1e3 * self.embedding:.1f} ms, a local head "
            f"{1e3 * self.local_head:.1f} ms, the output head with its loss {1e3 * self.output:.1f} ms"
        )


def measure(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    anatomy: Anatomy,
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
        model_class: the whole model's class.
        config: the whole model's config.
        anatomy: of the class.
        shape: (rows, tokens) of a microbatch.
        accumulation: microbatches of an optimizer step.
        objective: what stages learn from.
        optim: the optimizer.
        stage: how stages compute.
        device: to measure on.
    """
    timer = _Timer(model_class, config, anatomy, shape, optim, stage, device)
    # Whatever blocks learn from, their layers cost the same, which is measured with the cheapest objective.
    plain = replace(objective, method="lopt", local_objective="reconstruction", local_accumulation_steps=None)
    frozen = replace(plain, method="frozen")
    depth = config.num_hidden_layers

    layers, head = timer.learning_layers(plain, accumulation)
    output = max(timer.stage(Span(1, 2, depth - 1, depth), plain, accumulation) - layers[-1], 0.0)
    if objective.local == "none":
        standing = timer.layers(frozen, accumulation)
        return Costs(tuple(layers), tuple(standing), embedding=0.0, local_head=0.0, output=output)
    learned = objective.num_learned(accumulation)
    share, own, earlier = learned / accumulation, layers, layers
    if share < 1:  # A step of the optimizer goes with fewer microbatches; the others are run forward.
        own, head = timer.learning_layers(plain, learned)
        standing = timer.layers(frozen, accumulation)
        earlier = [share * layer + (1 - share) * less for layer, less in zip(own, standing, strict=True)]
    return Costs(
        layers=tuple(layers),
        earlier_layers=tuple(earlier),
        embedding=share * max(timer.stage(Span(0, 2, 0, 1), plain, learned) - own[0] - head, 0.0),
        local_head=share * (head if objective == plain else timer.local_head(objective, learned)),
        output=output,
    )


class _Timer:
    """Times parts of a model with random weights, on random microbatches; all times are seconds per microbatch.

    Arguments as for `measure`.
    """

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        anatomy: Anatomy,
        shape: tuple[int, int],
        optim: OptimConfig,
        stage: StageConfig,
        device: torch.device,
    ) -> None:
        self._model_class, self._config, self._anatomy = model_class, config, anatomy
        self._optim, self._stage, self._device = optim, stage, device
        self._batch = random_microbatch(shape, config.vocab_size, device)
        self._received = torch.randn(*shape, config.hidden_size, device=device, dtype=stage.compute_dtype)
        self._kinds = layer_kinds(model_class, config, anatomy)

    def stage(self, span: Span, objective: ObjectiveConfig, accumulation: int) -> float:
        """Of a whole stage."""
        block = self._make_block(span, objective)
        own = local_objective(block, objective, seed=0)
        timed = Stage(block, own, self._optim, num_steps=10**6, config=self._stage, device=self._device)

        def microbatch() -> None:
            output = timed.forward(self._batch, None if span.is_first else self._received)
            timed.outgoing(output)
            if timed.learns:
                timed.loss(output, self._batch, self._batch.num_tokens).backward()

        return self._seconds(microbatch, lambda: timed.step(0), accumulation)

    def local_head(self, objective: ObjectiveConfig, accumulation: int) -> float:
        """Of the loss of an earlier stage, which is taken to end in the middle of the model."""
        middle = max(self._config.num_hidden_layers // 2, 1)
        load = functools.partial(self._make_block, objective=objective)
        head = local_objective(load(Span(1, 3, middle - 1, middle)), objective, seed=0, load=load)
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
        spans = {kind: Span(1, 3, number, number + 1) for number, kind in enumerate(self._kinds)}
        of_kind = {kind: self.stage(span, objective, accumulation) for kind, span in spans.items()}
        return [of_kind[kind] for kind in self._kinds]

    def learning_layers(self, objective: ObjectiveConfig, accumulation: int) -> tuple[list[float], float]:
        """Of the layers alone, and of the head that they are measured with."""
        head = self.local_head(objective, accumulation)
        return [max(layer - head, 0.0) for layer in self.layers(objective, accumulation)], head

    def _make_block(self, span: Span, objective: ObjectiveConfig) -> BlockModel:
        block = random_block(self._model_class, self._config, self._anatomy, span)
        if not objective.train_embeddings:
            block.hold_embeddings()
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


def layer_kinds(model_class: type[PreTrainedModel], config: PreTrainedConfig, anatomy: Anatomy) -> list[str]:
    """Of each layer what makes layers cost the same: its tensors' shapes, and its entries in lists of the config."""
    with torch.device("meta"):
        layers = model_class(config).get_submodule(anatomy.layers).children()
    lists = [value for value in vars(config).values() if _is_per_layer(value, config.num_hidden_layers)]
    return [
        repr(
            (
                [(name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()],
                [value[number] for value in lists],
            )
        )
        for number, layer in enumerate(layers)
    ]


def _is_per_layer(value: object, depth: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == depth

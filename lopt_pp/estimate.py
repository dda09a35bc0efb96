"""What the processes of a run hold and compute: their stages, run on tensors without memory.

Nothing is a formula for a family of models: the blocks, the losses and the optimizer are those of a run, and what is
counted is what they make. Three things are computed instead: the queue at a boundary, the receive buffers of 1F1B, and
what FSDP2 gathers.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedConfig

from lopt_pp.computation import prepare_block
from lopt_pp.costs import Costs, layer_kinds
from lopt_pp.end_to_end import PipelineModule, clip_grad_norm
from lopt_pp.errors import LoptError, first_line
from lopt_pp.fake import fake_tensors, make_fake
from lopt_pp.meter import Meter
from lopt_pp.needs import Load, Memory, Needs
from lopt_pp.objectives import Objective, local_objective
from lopt_pp.optim import Optimizer
from lopt_pp.span import Span, split_evenly
from lopt_pp.split import BlockModel, block_class
from lopt_pp.stage import Stage
from lopt_pp.stand_ins import random_microbatch
from lopt_pp.verify import check_split, model_class_of

_CPU = torch.device("cpu")


class Model:
    """A model that is known by its config.

    Args:
        config: of the whole model; its embeddings are taken as untied, as the trainer unties them.
        spans: blocks that it is to be cut into; their boundaries are checked.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        LoptError: no model can be made of the config, or it cannot be split.
    """

    def __init__(self, config: PreTrainedConfig, spans: Sequence[Span] | None, trust_remote_code: bool = False) -> None:
        self.config = copy.deepcopy(config)
        self.config.tie_word_embeddings = False
        self.model_class = model_class_of(self.config, trust_remote_code)
        self.depth: int = self.config.num_hidden_layers
        self.anatomy = check_split(self.model_class, self.config, spans or split_evenly(self.depth, 1))
        self._kinds = layer_kinds(self.model_class, self.config, self.anatomy)
        self._known: dict[object, Needs] = {}

    def message_bytes(self, load: Load) -> int:
        """What crosses a boundary for a microbatch."""
        return load.rows * load.tokens * self.config.hidden_size * load.stage.compute_dtype.itemsize

    def process(self, spans: Sequence[Span], load: Load) -> Needs:
        """Of a process that trains the blocks at `spans`, in turn, each by its own loss.

        Raises:
            LoptError: the model's code does not run on tensors without memory.
        """
        # What an objective copies of the model may depend on where its block ends.
        stops = () if load.objective.local in ("reconstruction", "none") else tuple(span.stop for span in spans)
        return self._once(("local", self._parts(spans), stops, load), lambda: self._local_learning(spans, load))

    def pipeline_process(self, span: Span, load: Load) -> Needs:
        """Of a process that trains the block at `span` end to end with the others, by 1F1B.

        Raises:
            LoptError: as above.
        """
        left = span.num_stages - span.stage
        under_way = load.accumulation if load.accumulation < span.num_stages else left
        key = "1F1B", self._parts([span]), load, under_way
        return self._once(key, lambda: self._fullest_of_1f1b(span, load, under_way))

    def _parts(self, spans: Sequence[Span]) -> tuple[object, ...]:
        """What makes processes alike: the kinds of their layers, and what stands around these."""
        return tuple((span.is_first, span.is_last, *self._kinds[span.start : span.stop]) for span in spans)

    def _once(self, key: object, find: Callable[[], Needs]) -> Needs:
        if key not in self._known:
            with self._explaining():
                self._known[key] = find()
        return self._known[key]

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except LoptError:
            raise
        except Exception as error:  # Whatever a class of transformers, or the user's own, may raise.
            raise LoptError(
                f"{self.model_class.__name__} cannot be planned: on tensors without memory it fails with: "
                f"{first_line(error)}"
            ) from error

    def _block(self, span: Span) -> BlockModel:
        with torch.device("meta"):
            model = block_class(self.model_class, self.anatomy, span)(self.config)
        return BlockModel(model, self.anatomy, span)

    def _objective(self, block: BlockModel, load: Load) -> Objective | None:
        """What a block learns from. What it copies of the model is made where blocks are: outside of fake tensors."""

        def copy(span: Span) -> BlockModel:
            with unset_fake_temporarily():
                return self._block(span)

        return local_objective(block, load.objective, seed=0, load=copy)

    def _local_learning(self, spans: Sequence[Span], load: Load) -> Needs:
        meter, kept = Meter(load.memory_multiple), 0
        blocks = [self._block(span) for span in spans]
        for block in blocks if not load.objective.train_embeddings else ():
            block.hold_embeddings()
        with fake_tensors(load.device):
            stages = []
            for block in blocks:
                objective = self._objective(block, load)
                modules = [block] if objective is None else [block, objective]
                _place(modules, load, meter)
                steps = load.objective.local_accumulation_steps
                stages.append(Stage(block, objective, load.optim, 1, config=load.stage, local_accumulation_steps=steps))
            optimizers = [stage.optimizer for stage in stages if stage.optimizer is not None]
            learned = load.accumulation if spans[-1].is_last else load.objective.num_learned(load.accumulation)
            _prepare(optimizers, load, meter, load.finds_gradients(learned))
            with meter:
                batch = random_microbatch((load.rows, load.tokens), self.config.vocab_size, _CPU)
                received, operations = None if spans[0].is_first else self._message(load), 0.0
                # As in lopt_pp/trainer.py, where the names live as long.
                for stage in stages:
                    before = meter.operations
                    output = stage.forward(batch, received)
                    outgoing = None if stage.block.span.is_last else stage.outgoing(output)
                    if stage.learns:
                        loss = stage.loss(output, batch, batch.num_tokens)
                        kept = max(kept, meter.live["activations"])
                        loss.backward()
                        del loss
                    del output
                    own, share = meter.operations - before, stage.learned_share(load.accumulation) or 1.0
                    if share < 1:  # Other microbatches only go forward.
                        stage.forward(batch, received, learns=False)
                    operations += share * own + (1 - share) * (meter.operations - before - own)
                    received = outgoing
                    del outgoing
                del received
                for optimizer in optimizers:
                    optimizer.clip()
                    optimizer.step()
            parameters = sum(parameter.numel() for stage in stages for parameter in _parameters(stage))
        receives, sends = not spans[0].is_first, not spans[-1].is_last
        # The message at work is counted where it is: in the received buffer, in what is sent on. A stage that only
        # runs forward is fullest before it sends.
        waiting = receives * load.queue_depth + sends * (load.queue_depth - stages[-1].learns)
        memory = self._memory(meter, spans, load, queue=waiting * self.message_bytes(load))
        return Needs(parameters, memory, kept, round(operations))

    def _fullest_of_1f1b(self, span: Span, load: Load, under_way: int) -> Needs:
        if load.replicas > 1 or load.accumulation > under_way:
            return self._one_f_one_b(span, load, under_way, finds_gradients=True)
        # The first of them to go backward finds no gradients; the next one does, and one less is under way.
        moments = [self._one_f_one_b(span, load, under_way, finds_gradients=False)]
        if under_way > 1:
            moments.append(self._one_f_one_b(span, load, under_way - 1, finds_gradients=True))
        return replace(max(moments, key=lambda needs: needs.memory.total), kept=moments[0].kept)

    def _one_f_one_b(self, span: Span, load: Load, under_way: int, finds_gradients: bool) -> Needs:
        meter, block = Meter(load.memory_multiple), self._block(span)
        with fake_tensors(load.device):
            _place([block], load, meter)
            module = PipelineModule(prepare_block(block, load.stage, _CPU), load.stage, 0, splits_backward=False)
            optimizer = Optimizer(block.parameters(), load.optim, 0.0, 1)
            _prepare([optimizer], load, meter, finds_gradients)
            with meter:
                batch = random_microbatch((load.rows, load.tokens), self.config.vocab_size, _CPU)
                received = None if span.is_first else self._message(load).requires_grad_()
                gradient = None if span.is_last else self._message(load)
                module.begin([batch], batch.num_targets)
                before = meter.live["activations"]
                output = module(received, index=torch.tensor([0]))
                kept = meter.live["activations"] - before
                torch.autograd.backward(output, gradient)
                operations = meter.operations
                del output, received, gradient
                clip_grad_norm(optimizer.parameters, load.optim.max_grad_norm, None)
                optimizer.step()
            parameters = sum(parameter.numel() for parameter in block.parameters())
        # A schedule has a buffer for each message of a step, either way; one of them is counted as it is at work.
        sides = (not span.is_first) + (not span.is_last)
        queue = (load.accumulation - 1) * sides * self.message_bytes(load)
        # The others that are under way are between their forward and their backward.
        memory = self._memory(meter, [span], load, queue, besides=(under_way - 1) * kept)
        return Needs(parameters, memory, under_way * kept, operations)

    def _message(self, load: Load) -> torch.Tensor:
        shape = load.rows, load.tokens, self.config.hidden_size
        return torch.empty(shape, dtype=load.stage.compute_dtype)

    def _memory(self, meter: Meter, spans: Sequence[Span], load: Load, queue: int, besides: int = 0) -> Memory:
        shards = load.shards
        return Memory(
            weights=math.ceil(meter.peak["weights"] / shards),
            gradients=math.ceil(meter.peak["gradients"] / shards),
            optimizer=math.ceil(meter.peak["optimizer"] / shards),
            activations=meter.peak["activations"] + besides,
            gathered=max(self._gathered(span, load) for span in spans) if shards > 1 else 0,
            queue=queue,
        )

    def _gathered(self, span: Span, load: Load) -> int:
        """Weights and gradients of two layers and of what stands around the layers, which FSDP2 has whole at a time:
        one layer at work, and the next on its way."""
        block = self._block(span)
        with fake_tensors(load.device):
            objective = self._objective(block, load)
        parts = [block] if objective is None else [block, objective]
        layers = [
            layer for part in parts for own in part.modules() if isinstance(own, BlockModel) for layer in own.layers
        ]
        sizes = sorted(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
        around = sum(parameter.numel() for part in parts for parameter in part.parameters()) - sum(sizes)
        return 2 * load.stage.parameter_dtype.itemsize * (sum(sizes[-2:]) + around)

    def costs(self, load: Load) -> Costs:
        """The operations of the model's parts for a microbatch, for `lopt_pp.balance.balance`."""
        # Whatever blocks learn from, their layers cost the same.
        plain = replace(load.objective, method="lopt", local_objective="reconstruction", local_accumulation_steps=None)
        learning = replace(load, objective=plain, accumulation=1)
        given = replace(learning, objective=replace(load.objective, local_accumulation_steps=None))
        standing = replace(learning, objective=replace(plain, method="frozen"))
        share = load.objective.num_learned(load.accumulation) / load.accumulation

        def operations(span: Span, load: Load = learning) -> float:
            return float(self.process([span], load).operations)

        def alone(number: int, load: Load = learning) -> float:
            """Of a stage of one layer among others."""
            return operations(Span(1, 3, number, number + 1), load)

        last = self.depth - 1
        # Two stages of one layer have a head more than one of two.
        head = alone(0) + alone(1) - operations(Span(1, 3, 0, 2)) if self.depth > 1 else 0.0
        layers = tuple(alone(number) - head for number in range(self.depth))
        earlier = layers
        if share < 1:
            forward = [alone(number, standing) for number in range(self.depth)]
            earlier = tuple(share * own + (1 - share) * less for own, less in zip(layers, forward, strict=True))
        middle = max(self.depth // 2, 1) - 1
        # A local loss is taken to be that of a stage that ends in the middle of the model.
        local_head = head if given == learning or self.depth == 1 else alone(middle, given) - layers[middle]
        return Costs(
            layers=layers,
            earlier_layers=earlier,
            embedding=operations(Span(0, 2, 0, 1)) - layers[0] - head,
            local_head=share * local_head,
            output=operations(Span(1, 2, last, last + 1)) - layers[last],
        )


def _place(modules: Sequence[torch.nn.Module], load: Load, meter: Meter) -> None:
    """Gives modules weights, and counts them."""
    for module in modules:
        make_fake(module, load.stage.parameter_dtype)
        meter.note([*module.parameters(), *module.buffers()], "weights")


def _prepare(optimizers: Sequence[Optimizer], load: Load, meter: Meter, finds_gradients: bool) -> None:
    """Makes the optimizers' state, as their first step does, and if so the gradients that a microbatch finds."""
    for optimizer in optimizers:
        for group in optimizer.adamw.param_groups:
            # AdamW sees that its parameters are of no plain class, and would go through them one by one.
            group["foreach"] = load.device.type == "cuda" and not optimizer.is_fused
        _fill_gradients(optimizer)
        optimizer.step()
        meter.note(list(optimizer.adamw.state.values()), "optimizer")
        if finds_gradients:
            _fill_gradients(optimizer)
            meter.note([parameter.grad for parameter in optimizer.parameters], "gradients")
        for parameter in optimizer.parameters:
            parameter.register_post_accumulate_grad_hook(lambda own: meter.note(own.grad, "gradients"))
    meter.forget_peak()


def _fill_gradients(optimizer: Optimizer) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)


def _parameters(stage: Stage) -> Iterator[torch.nn.Parameter]:
    yield from stage.block.parameters()
    if stage.objective is not None:
        yield from stage.objective.parameters()

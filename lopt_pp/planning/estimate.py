"""What the processes of a run hold and compute: their stages, run on tensors without memory.

Nothing is a formula for a family of models: the blocks, the losses and the optimizer are those of a run, and what is
counted is what they make. Three things are computed instead: the queue at a boundary, the receive buffers of 1F1B, and
what FSDP2 gathers.
"""

import contextlib
import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.block import BlockModel
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec, split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.objectives import Objective, local_objective
from lopt_pp.planning.costs import Costs, layer_kinds
from lopt_pp.planning.fake_tensors import fake_tensors
from lopt_pp.planning.memory_tracker import MemoryTracker
from lopt_pp.planning.modules import on_device, parameters_of, place, prepare
from lopt_pp.planning.synthetic import random_microbatch
from lopt_pp.planning.workload import Memory, Requirements, Workload
from lopt_pp.stage.compute import prepare_block
from lopt_pp.stage.end_to_end import PipelineModule, clip_grad_norm
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.stage import Stage
from lopt_pp.util.compat_torch import real_tensors

_CPU = torch.device("cpu")


class Model:
    """A model that is known by its config.

    Args:
        config: of the whole model; stages are taken to have its embeddings untied, as the trainer unties them.
        specs: blocks that it is to be cut into; their boundaries are checked.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        LoptError: no model can be made of the config, or it cannot be split.
    """

    def __init__(
        self, config: PreTrainedConfig, specs: Sequence[BlockSpec] | None, trust_remote_code: bool = False
    ) -> None:
        self._tied_config = config
        self.config = copy.deepcopy(config)
        self.config.tie_word_embeddings = False
        self.model_class = model_class_of(self.config, trust_remote_code)
        self.depth: int = self.config.num_hidden_layers
        self.structure = check_split(self.model_class, self.config, specs or split_evenly(self.depth, 1))
        self.builder = BlockBuilder(self.model_class, self.config, self.structure)
        self._kinds = layer_kinds(self.model_class, self.config, self.structure)
        self._known: dict[object, Requirements] = {}

    def message_bytes(self, workload: Workload) -> int:
        """What crosses a boundary for a microbatch."""
        return workload.rows * workload.tokens * self.config.hidden_size * workload.stage.compute_dtype.itemsize

    def process(self, specs: Sequence[BlockSpec], workload: Workload) -> Requirements:
        """Of a process that trains the blocks at `specs`, in turn, each by its own loss.

        Raises:
            LoptError: the model's code does not run on tensors without memory.
        """
        # What an objective copies of the model may depend on where its block ends.
        stops = () if workload.objective.local in ("reconstruction", "none") else tuple(spec.stop for spec in specs)
        return self._once(("local", self._parts(specs), stops, workload), lambda: self._local_learning(specs, workload))

    def end_to_end_process(self, workload: Workload) -> Requirements:
        """Of a process that trains all of the model end to end, with its embeddings tied where the model ties them.

        Raises:
            LoptError: as above.
        """
        tied = copy.copy(self)
        ties = workload.objective.train_embeddings  # Otherwise the head learns by itself.
        tied.builder = replace(self.builder, config=self._tied_config, ties_embeddings=ties)
        tied._known = {}
        return tied.process([BlockSpec(0, 1, 0, self.depth)], workload)

    def pipeline_process(self, spec: BlockSpec, workload: Workload) -> Requirements:
        """Of a process that trains the block at `spec` end to end with the others, by 1F1B.

        Raises:
            LoptError: as above.
        """
        left = spec.num_stages - spec.stage
        under_way = workload.accumulation if workload.accumulation < spec.num_stages else left
        key = "1F1B", self._parts([spec]), workload, under_way
        return self._once(key, lambda: self._fullest_of_1f1b(spec, workload, under_way))

    def _parts(self, specs: Sequence[BlockSpec]) -> tuple[object, ...]:
        """What makes processes alike: the kinds of their layers, and what is around these."""
        return tuple((spec.is_first, spec.is_last, *self._kinds[spec.start : spec.stop]) for spec in specs)

    def _once(self, key: object, find: Callable[[], Requirements]) -> Requirements:
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

    def _objective(self, block: BlockModel, workload: Workload) -> Objective | None:
        """What a block learns from. What it copies of the model is made where blocks are: outside of fake tensors."""

        def copy(spec: BlockSpec) -> BlockModel:
            with real_tensors():
                return self.builder.on_meta(spec)

        return local_objective(block, workload.objective, seed=0, load=copy)

    def _local_learning(self, specs: Sequence[BlockSpec], workload: Workload) -> Requirements:
        tracker, kept = MemoryTracker(workload.memory_multiple), 0
        blocks = [self.builder.on_meta(spec) for spec in specs]
        for block in blocks if not workload.objective.train_embeddings else ():
            block.freeze_embeddings()
        with fake_tensors(workload.device):
            stages = []
            for block in blocks:
                objective = self._objective(block, workload)
                modules = [block] if objective is None else [block, objective]
                place(modules, workload, tracker)
                steps = workload.objective.local_accumulation_steps
                stages.append(
                    Stage(block, objective, workload.optim, 1, config=workload.stage, local_accumulation_steps=steps)
                )
            optimizers = [stage.optimizer for stage in stages if stage.optimizer is not None]
            learned = (
                workload.accumulation if specs[-1].is_last else workload.objective.num_learned(workload.accumulation)
            )
            prepare(optimizers, workload, tracker, workload.finds_gradients(learned))

            @contextlib.contextmanager
            def watch(phase: str) -> Iterator[None]:
                nonlocal kept
                if phase == "backward":
                    kept = max(kept, tracker.live["activations"])
                yield

            with tracker:
                batch = random_microbatch((workload.rows, workload.tokens), self.config.vocab_size, _CPU)
                received, operations = None if specs[0].is_first else self._message(workload), 0.0
                for stage in stages:
                    before, sent = tracker.operations, deque[torch.Tensor]()
                    stage.run_microbatch(
                        batch,
                        received,
                        None if stage.block.spec.is_last else sent.append,
                        step_count=batch.num_tokens if stage.learns else None,
                        clock=watch,
                    )
                    own = tracker.operations - before
                    share = stage.learned_share(workload.accumulation) if stage.learns else 1.0
                    if share < 1:  # Other microbatches only go forward.
                        stage.run_microbatch(batch, received)
                    operations += share * own + (1 - share) * (tracker.operations - before - own)
                    received = sent.popleft() if sent else None
                del received
                for optimizer in optimizers:
                    optimizer.clip()
                    optimizer.step()
            parameters = sum(parameter.numel() for stage in stages for parameter in parameters_of(stage))
        receives, sends = not specs[0].is_first, not specs[-1].is_last
        # The message at work is counted where it is: in the received buffer, in what is sent on. A stage that only
        # runs forward is fullest before it sends.
        waiting = receives * workload.queue_depth + sends * (workload.queue_depth - stages[-1].learns)
        memory = self._memory(tracker, specs, workload, queue=waiting * self.message_bytes(workload))
        return Requirements(parameters, on_device(memory, optimizers, workload), kept, round(operations))

    def _fullest_of_1f1b(self, spec: BlockSpec, workload: Workload, under_way: int) -> Requirements:
        if workload.replicas > 1 or workload.accumulation > under_way:
            return self._one_f_one_b(spec, workload, under_way, finds_gradients=True)
        # The first of them to go backward finds no gradients; the next one does, and one less is under way.
        moments = [self._one_f_one_b(spec, workload, under_way, finds_gradients=False)]
        if under_way > 1:
            moments.append(self._one_f_one_b(spec, workload, under_way - 1, finds_gradients=True))
        return replace(max(moments, key=lambda requirements: requirements.memory.total), kept=moments[0].kept)

    def _one_f_one_b(self, spec: BlockSpec, workload: Workload, under_way: int, finds_gradients: bool) -> Requirements:
        tracker, block = MemoryTracker(workload.memory_multiple), self.builder.on_meta(spec)
        with fake_tensors(workload.device):
            place([block], workload, tracker)
            module = PipelineModule(
                prepare_block(block, workload.stage, _CPU),
                workload.stage,
                0,
                splits_backward=False,
                objective=workload.objective,
            )
            optimizer = Optimizer(block.parameters(), workload.optim, 0.0, 1)
            prepare([optimizer], workload, tracker, finds_gradients)
            with tracker:
                batch = random_microbatch((workload.rows, workload.tokens), self.config.vocab_size, _CPU)
                received = None if spec.is_first else self._message(workload).requires_grad_()
                gradient = None if spec.is_last else self._message(workload)
                module.begin([batch], batch.num_targets)
                before = tracker.live["activations"]
                output = module(received, index=torch.tensor([0]))
                kept = tracker.live["activations"] - before
                torch.autograd.backward(output, gradient)
                operations = tracker.operations
                del output, received, gradient
                clip_grad_norm(optimizer.parameters, workload.optim.max_grad_norm, None)
                optimizer.step()
            parameters = sum(parameter.numel() for parameter in block.parameters())
        # A schedule has a buffer for each message of a step, either way; one of them is counted as it is at work.
        sides = (not spec.is_first) + (not spec.is_last)
        queue = (workload.accumulation - 1) * sides * self.message_bytes(workload)
        # The others that are under way are between their forward and their backward.
        memory = self._memory(tracker, [spec], workload, queue, besides=(under_way - 1) * kept)
        return Requirements(parameters, on_device(memory, [optimizer], workload), under_way * kept, operations)

    def _message(self, workload: Workload) -> torch.Tensor:
        shape = workload.rows, workload.tokens, self.config.hidden_size
        return torch.empty(shape, dtype=workload.stage.compute_dtype)

    def _memory(
        self, tracker: MemoryTracker, specs: Sequence[BlockSpec], workload: Workload, queue: int, besides: int = 0
    ) -> Memory:
        shards = workload.shards
        return Memory(
            weights=math.ceil(tracker.peak["weights"] / shards),
            gradients=math.ceil(tracker.peak["gradients"] / shards),
            optimizer=math.ceil(tracker.peak["optimizer"] / shards),
            activations=tracker.peak["activations"] + besides,
            gathered=max(self._gathered(spec, workload) for spec in specs) if shards > 1 else 0,
            queue=queue,
        )

    def _gathered(self, spec: BlockSpec, workload: Workload) -> int:
        """Weights and gradients of two layers and of what is around the layers, which FSDP2 has whole at a time:
        one layer at work, and the next on its way."""
        block = self.builder.on_meta(spec)
        with fake_tensors(workload.device):
            objective = self._objective(block, workload)
        parts = [block] if objective is None else [block, objective]
        layers = [
            layer for part in parts for own in part.modules() if isinstance(own, BlockModel) for layer in own.layers
        ]
        sizes = sorted(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
        around = sum(parameter.numel() for part in parts for parameter in part.parameters()) - sum(sizes)
        return 2 * workload.stage.parameter_dtype.itemsize * (sum(sizes[-2:]) + around)

    def costs(self, workload: Workload) -> Costs:
        """The operations of the model's parts for a microbatch, for `lopt_pp.planning.balance.balance`."""
        # Whatever blocks learn from, their layers cost the same.
        plain = replace(
            workload.objective, method="lopt", local_objective="reconstruction", local_accumulation_steps=None
        )
        learning = replace(workload, objective=plain, accumulation=1)
        given = replace(learning, objective=replace(workload.objective, local_accumulation_steps=None))
        frozen = replace(learning, objective=replace(plain, method="frozen"))
        share = workload.objective.num_learned(workload.accumulation) / workload.accumulation

        def operations(spec: BlockSpec, workload: Workload = learning) -> float:
            return float(self.process([spec], workload).operations)

        def alone(number: int, workload: Workload = learning) -> float:
            """Of a stage of one layer among others."""
            return operations(BlockSpec(1, 3, number, number + 1), workload)

        last = self.depth - 1
        # Two stages of one layer have a head more than one of two.
        head = alone(0) + alone(1) - operations(BlockSpec(1, 3, 0, 2)) if self.depth > 1 else 0.0
        layers = tuple(alone(number) - head for number in range(self.depth))
        earlier = layers
        if share < 1:
            forward = [alone(number, frozen) for number in range(self.depth)]
            earlier = tuple(share * own + (1 - share) * less for own, less in zip(layers, forward, strict=True))
        middle = max(self.depth // 2, 1) - 1
        # A local loss is taken to be that of a stage that ends in the middle of the model.
        local_head = head if given == learning or self.depth == 1 else alone(middle, given) - layers[middle]
        return Costs(
            layers=layers,
            earlier_layers=earlier,
            embedding=operations(BlockSpec(0, 2, 0, 1)) - layers[0] - head,
            local_head=share * local_head,
            output=operations(BlockSpec(1, 2, last, last + 1)) - layers[last],
        )

"""What a plan says of a process is what the real stages, loss, optimizer and loop take."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from families import FAMILIES, tiny_config
from small_stages import objective_of
from transformers import LlamaModel

from benchmarks.helpers.process_memory import SavedTensors
from benchmarks.helpers.synthetic import random_rows
from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.optimizer_names import optimizer_kind
from lopt_pp.data import MicrobatchSampler
from lopt_pp.errors import LoptError
from lopt_pp.model.partition import BlockSpec, split_at, split_evenly
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.pipeline.stream import LocalStream, Receiver, Sender
from lopt_pp.planning.balance import balance
from lopt_pp.planning.estimate import Model
from lopt_pp.planning.memory_tracker import MemoryTracker
from lopt_pp.planning.workload import Requirements, Workload
from lopt_pp.stage.end_to_end import EndToEndPipeline
from lopt_pp.stage.stage import Stage
from lopt_pp.training.loop import train
from lopt_pp.training.phases import LocalTraining
from lopt_pp.training.segment import Segment
from lopt_pp.training.step_plan import StepPlan

CPU = torch.device("cpu")
ROWS, TOKENS = 2, 96
FROZEN = ObjectiveConfig(method="frozen")


def workload(accumulation: int = 2, **others: Any) -> Workload:
    return Workload(ROWS, TOKENS, accumulation, device=CPU, **others)


def small_model(family: str = "llama", **changes: Any) -> Model:
    return Model(tiny_config(family, **{"vocab_size": 1024, **changes}), None)


def real_stages(model: Model, specs: Sequence[BlockSpec], given: Workload) -> list[Stage]:
    torch.manual_seed(0)
    stages = []
    for spec in specs:
        block = model.builder.with_random_weights(spec)
        if not given.objective.train_embeddings:
            block.freeze_embeddings()
        objective = local_objective(block, given.objective, 0, model.builder.with_random_weights)
        learned = given.objective.local_accumulation_steps
        stages.append(Stage(block, objective, given.optim, 10**6, config=given.stage, local_accumulation_steps=learned))
    return stages


class Feed:
    """The ends of a boundary to another process: gives messages made before, and lets go of what it is sent."""

    def __init__(self, message: torch.Tensor) -> None:
        self._message = message

    def receive(self) -> torch.Tensor:
        return self._message

    def send(self, hidden_states: torch.Tensor) -> None:
        self._message = hidden_states

    def close(self) -> None:
        pass


def order_of(model: Model, given: Workload, steps: int) -> MicrobatchSampler:
    return MicrobatchSampler(
        random_rows(model.config.vocab_size, given.tokens, given.rows * given.accumulation * steps),
        per_device_train_batch_size=given.rows,
        gradient_accumulation_steps=given.accumulation,
        shuffle=False,
        seed=0,
        pad_token_id=0,
    )


def run(stages: Sequence[Stage], model: Model, given: Workload, steps: range, sampler: MicrobatchSampler) -> None:
    """Trains by the real loop."""
    receivers: dict[int, Receiver] = {}
    senders: dict[int, Sender] = {}
    for before, after in pairwise(stages):
        senders[before.index] = receivers[after.index] = LocalStream()
    shape = given.rows, given.tokens, model.config.hidden_size
    if not stages[0].block.spec.is_first:
        receivers[stages[0].index] = Feed(torch.zeros(shape, dtype=given.stage.compute_dtype))
    if not stages[-1].block.spec.is_last:
        senders[stages[-1].index] = Feed(torch.zeros(()))
    plan = StepPlan(sampler, [LocalTraining(sampler)])
    train(Segment(stages, receivers, senders), plan, steps, lambda record: None)


def real_peak(model: Model, stages: Sequence[Stage], given: Workload) -> MemoryTracker:
    """Counts a step after the first one, on real tensors."""
    sampler = order_of(model, given, steps=2)
    run(stages, model, given, range(1), sampler)
    tracker = MemoryTracker()
    for stage in stages:
        tracker.note([*stage.block.parameters(), *stage.block.buffers()], "weights")
        if stage.objective is not None:
            tracker.note([*stage.objective.parameters(), *stage.objective.buffers()], "weights")
        if stage.optimizer is not None:
            tracker.note(list(stage.optimizer.inner.state.values()), "optimizer")
            for parameter in stage.optimizer.parameters:
                parameter.register_post_accumulate_grad_hook(lambda own: tracker.note(own.grad, "gradients"))
    with tracker:
        run(stages, model, given, range(1, 2), sampler)
    return tracker


def check(requirements: Requirements, tracker: MemoryTracker, besides: int = 0) -> None:
    memory = requirements.memory
    assert (memory.weights, memory.optimizer) == (tracker.peak["weights"], tracker.peak["optimizer"])
    # The real loop has the tokens of all microbatches, and a feed instead of a queue.
    assert memory.gradients == pytest.approx(tracker.peak["gradients"], rel=0.02)
    assert memory.activations + besides == pytest.approx(tracker.peak["activations"], rel=0.03)


@pytest.mark.parametrize(
    ("stages", "dtype", "accumulation"),
    [
        ([0, 1, 2], "float32", 1),
        ([0, 1, 2], "bfloat16", 3),
        ([0], "bfloat16", 3),
        ([1], "bfloat16", 1),
        ([2], "bfloat16", 1),
        ([2], "pure_bfloat16", 3),
    ],
)
def test_memory_is_that_of_the_real_loop(stages: list[int], dtype: Any, accumulation: int) -> None:
    model, given = small_model(num_hidden_layers=6), workload(accumulation, stage=StageConfig(dtype=dtype))
    specs = [split_evenly(6, 3)[stage] for stage in stages]
    check(model.process(specs, given), real_peak(model, real_stages(model, specs, given), given))


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "muon", "schedule_free_adamw"])
def test_state_of_optimizers_is_that_of_the_real_loop(name: Any) -> None:
    if (package := optimizer_kind(name).package) is not None:
        pytest.importorskip(package)
    model, given = small_model(num_hidden_layers=2), workload(1, optim=OptimConfig(optim=name))
    specs = [split_evenly(2, 2)[1]]
    planned, real = model.process(specs, given).memory, real_peak(model, real_stages(model, specs, given), given)
    assert planned.optimizer == pytest.approx(real.peak["optimizer"], rel=1e-3) and planned.optimizer > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_as_in_the_real_loop(family: str) -> None:
    model = small_model(family)
    specs = split_evenly(model.depth, 2)
    requirements = model.process(specs, workload())
    stages = real_stages(model, specs, workload())
    modules = [module for stage in stages for module in (stage.block, objective_of(stage))]
    assert requirements.parameters == sum(parameter.numel() for module in modules for parameter in module.parameters())
    check(requirements, real_peak(model, stages, workload()))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("method", ["lopt", "frozen"])
def test_checkpointing_and_methods(family: str, method: Literal["lopt", "frozen"]) -> None:
    model = small_model(family)
    given = workload(stage=StageConfig(gradient_checkpointing=True), objective=ObjectiveConfig(method=method))
    for specs in ([split_evenly(model.depth, 2)[0]], split_evenly(model.depth, 2), split_evenly(model.depth, 1)):
        # What only runs forward is fullest while the feed still has the message before.
        only_forward = method == "frozen" and not specs[-1].is_last
        queued = model.message_bytes(given) if only_forward else 0
        check(model.process(specs, given), real_peak(model, real_stages(model, specs, given), given), queued)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_an_auxiliary_network_is_counted(family: str, embeddings: bool) -> None:
    model = small_model(family)
    given = workload(objective=ObjectiveConfig(local_objective="next_token", train_embeddings=embeddings))
    spec = split_evenly(model.depth, 2)[0]
    requirements = model.process([spec], given)
    check(requirements, real_peak(model, real_stages(model, [spec], given), given))
    assert requirements.parameters > 1.3 * model.process([spec], workload()).parameters
    assert requirements.operations > 1.3 * model.process([spec], workload()).operations
    costs, plain = model.costs(given), model.costs(workload())
    assert costs.layers == plain.layers and costs.local_head > 2 * max(costs.layers) > plain.local_head
    assert costs.of(0, spec.stop, 1) == pytest.approx(requirements.operations, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("local", ["reconstruction", "next_token"])
def test_microbatches_that_only_go_forward_are_counted_so(local: str) -> None:
    model = small_model()
    spec = split_evenly(model.depth, 2)[0]
    whole, half, none = (
        workload(accumulation=4, objective=objective)
        for objective in (
            ObjectiveConfig(local_objective=local),
            ObjectiveConfig(local_objective=local, local_accumulation_steps=2),
            FROZEN,
        )
    )
    operations = [model.process([spec], given).operations for given in (whole, half, none)]
    assert operations[1] == pytest.approx((operations[0] + operations[2]) / 2, rel=1e-6)
    first, second, third = (model.costs(given) for given in (whole, half, none))
    assert second.layers == first.layers and second.local_head == pytest.approx(first.local_head / 2)
    assert second.earlier_layers == pytest.approx(
        [(a + b) / 2 for a, b in zip(first.earlier_layers, third.earlier_layers, strict=True)]
    )
    assert second.of(0, spec.stop, 1) == pytest.approx(operations[1], rel=0.05)
    # The only one that is learned from finds no gradients.
    single = workload(accumulation=2, objective=replace(half.objective, local_accumulation_steps=1))
    check(model.process([spec], single), real_peak(model, real_stages(model, [spec], single), single))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_what_is_kept_is_what_autograd_saves(family: str) -> None:
    model, given = small_model(family, num_hidden_layers=8), workload()
    spec = split_evenly(8, 2)[0]
    (stage,) = real_stages(model, [spec], given)
    with SavedTensors([*stage.block.parameters(), *objective_of(stage).parameters()]) as saved:
        run([stage], model, given, range(1), order_of(model, given, steps=1))
    # Alive besides are what leaves the stage, and the tokens.
    requirements = model.process([spec], given)
    assert saved.peak <= requirements.kept <= 1.05 * saved.peak


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_1f1b_holds_as_many_microbatches_as_are_under_way(accumulation: int) -> None:
    model, given = small_model(num_hidden_layers=8), workload(accumulation)
    specs = split_evenly(8, 4)
    kept = [model.pipeline_process(spec, given).kept for spec in specs]
    alone = [model.pipeline_process(spec, replace(given, accumulation=1)).kept for spec in specs]
    # PyTorch's 1F1B refuses fewer microbatches than stages; GPipe runs in its place, and has all of them under way.
    under_way = [accumulation] * 4 if accumulation < 4 else [4, 3, 2, 1]
    assert [most / one for most, one in zip(kept, alone, strict=True)] == pytest.approx(under_way, rel=0.1)
    message = ROWS * TOKENS * 64 * 4
    queues = [model.pipeline_process(spec, given).memory.queue for spec in specs]
    assert queues == [(accumulation - 1) * sides * message for sides in (1, 2, 2, 1)]


def test_end_to_end_in_one_process_is_a_pipeline_of_one_block() -> None:
    model, given = small_model(), workload()
    (spec,) = split_evenly(model.depth, 1)
    block = model.builder.with_random_weights(spec)
    pipeline = EndToEndPipeline([block], None, config=given.stage, objective=given.objective)
    sampler = order_of(model, given, steps=1)
    tracker = MemoryTracker()
    with tracker:
        pipeline.step(sampler.microbatches(0), sampler.counts(0).num_targets)
    by_plan = model.pipeline_process(spec, given).operations, model.process([spec], given).operations
    assert by_plan[0] == by_plan[1] == tracker.operations // 2


@pytest.mark.slow
def test_operations_of_parts_add_up_to_those_of_stages() -> None:
    model, given = small_model("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0, 3]), workload()
    costs = model.costs(given)
    for specs in (split_at([2, 5], 6), split_evenly(6, 1)):
        for spec in specs:
            assert costs.of(spec.start, spec.stop, int(not spec.is_last)) == model.process([spec], given).operations
    frozen = model.costs(replace(given, objective=FROZEN))
    assert frozen.local_head == 0 and sum(frozen.earlier_layers) < 0.5 * sum(frozen.layers)
    assert len(balance(costs, [1, 1])) == 2


def test_replicas_have_room_for_all_gradients_and_shards_have_their_share() -> None:
    model, spec = small_model(), split_evenly(4, 2)[1]
    alone, copies, shards = (
        model.process([spec], workload(1, replicas=replicas, sharding=sharding)).memory
        for replicas, sharding in ((1, "none"), (2, "none"), (4, "full"))
    )
    assert alone.gradients < copies.gradients == pytest.approx(copies.weights, rel=0.001)
    assert shards.weights == -(-copies.weights // 4) and shards.optimizer == -(-copies.optimizer // 4)
    assert copies.gathered == 0 < shards.gathered


def test_a_model_that_looks_at_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    forward = LlamaModel.forward

    def curious(self: LlamaModel, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        assert inputs_embeds.sum() > 0
        return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", curious)
    with pytest.raises(LoptError, match="LlamaForCausalLM cannot be planned: on tensors without memory it fails with"):
        model.process([split_evenly(4, 2)[1]], workload())

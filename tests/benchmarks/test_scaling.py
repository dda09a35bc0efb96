"""The formulas of what a stage needs, against what PyTorch counts."""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from families import tiny_config
from small_stages import optimizer_of
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.scaling import arithmetic
from benchmarks.scaling.model_sizes import Load, Model
from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec, split_evenly
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.planning.synthetic import random_microbatch
from lopt_pp.stage.stage import Stage

DTYPES = ("float32", "bfloat16", "pure_bfloat16")
FIRST, MIDDLE, LAST = BlockSpec(0, 2, 0, 3), BlockSpec(1, 3, 2, 5), BlockSpec(1, 2, 5, 8)


@functools.cache
def small_model(family: str = "llama") -> Model:
    """A small model with proportions of a large one."""
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}
    return Model(tiny_config(family, vocab_size=2048, num_hidden_layers=8, **sizes))


def make_stage(model: Model, spec: BlockSpec, config: StageConfig) -> Stage:
    torch.manual_seed(0)
    block = BlockBuilder(model.model_class, model.config, model.structure).with_random_weights(spec)
    return Stage(block, local_objective(block, ObjectiveConfig(), seed=0), OptimConfig(), num_steps=10, config=config)


def train_microbatch(stage: Stage, model: Model, load: Load) -> None:
    batch = random_microbatch((load.rows, load.tokens), model.vocabulary, torch.device("cpu"))
    received = torch.randn(load.rows, load.tokens, model.hidden, dtype=load.stage.compute_dtype)
    output = stage.forward(batch, None if stage.block.spec.is_first else received)
    stage.loss(output, batch, load.microbatch).backward()


@contextmanager
def saved_bytes(stage: Stage) -> Iterator[dict[int, int]]:
    """Counts what autograd saves for backward besides the parameters: bytes by storage."""
    parameters = {tensor.untyped_storage().data_ptr() for tensor in stage.block.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def saved_by_forward(model: Model, spec: BlockSpec, load: Load) -> int:
    stage = make_stage(model, spec, load.stage)
    batch = random_microbatch((load.rows, load.tokens), model.vocabulary, torch.device("cpu"))
    received = torch.randn(load.rows, load.tokens, model.hidden, dtype=load.stage.compute_dtype)
    with saved_bytes(stage) as saved:
        output = stage.forward(batch, received)  # Kept, so that no address is used twice.
    del output
    return sum(saved.values())


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors made while it is on, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def know(self, tensors: Any) -> None:
        """Counts the tensors that are new to it."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._forget, key, tensor.untyped_storage().nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.know(result)
        return result


def simulate_1f1b(k: int, microbatches: int, forward: float, backward: float, delay: float, slow: set[int]) -> float:
    """Seconds of a step of 1F1B: each stage does its forwards and backwards in that order as soon as it can.

    `slow` has the boundaries with the delay, by the stage before.
    """
    orders = []
    for stage in range(k):
        ahead = min(microbatches, k - stage)
        order = [("forward", m) for m in range(ahead)]
        for m in range(microbatches):
            order.append(("backward", m))
            if ahead + m < microbatches:
                order.append(("forward", ahead + m))
        orders.append(order)
    done: dict[tuple[str, int, int], float] = {}
    clocks, positions = [0.0] * k, [0] * k
    while any(position < len(order) for position, order in zip(positions, orders, strict=True)):
        for stage in range(k):
            while positions[stage] < len(orders[stage]):
                what, m = orders[stage][positions[stage]]
                other = stage - 1 if what == "forward" else stage + 1
                ready = 0.0
                if 0 <= other < k:
                    if (what, other, m) not in done:
                        break
                    ready = done[what, other, m] + (delay if min(stage, other) in slow else 0.0)
                clocks[stage] = max(clocks[stage], ready) + (forward if what == "forward" else backward)
                done[what, stage, m] = clocks[stage]
                positions[stage] += 1
    return max(clocks)


@pytest.mark.parametrize(
    ("name", "parameters"), [("7B", 7_615_616_512), ("32B", 32_763_876_352), ("70B", 70_553_706_496)]
)
def test_blocks_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    model = Model.load(name)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model.config)
    assert whole.num_parameters() == parameters
    for specs in (split_evenly(model.num_layers, 4), split_evenly(model.num_layers, 1)):
        assert sum(model.size(spec).block for spec in specs) == parameters


def test_tied_embeddings_are_counted_twice() -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    model = Model(config)
    with torch.device("meta"):
        tied = AutoModelForCausalLM.from_config(config).num_parameters()
    counted = sum(model.size(spec).block for spec in split_evenly(config.num_hidden_layers, 2))
    assert counted == tied + config.vocab_size * config.hidden_size


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_keep_what_autograd_saves(dtype: Any, checkpointing: bool, family: str) -> None:
    model, config = small_model(family), StageConfig(dtype=dtype, gradient_checkpointing=checkpointing)
    short, long = (Load(2, tokens, 1, config) for tokens in (64, 128))
    saved, twice = (saved_by_forward(model, MIDDLE, load) for load in (short, long))
    # What grows with the tokens is activations; the rest is autocast's copies of the weights.
    assert twice - saved == pytest.approx(arithmetic.saved_by_layers(model, short, 3), rel=0.05)
    copies = 2 * model.size(MIDDLE).layers_linear if config.autocasts and not checkpointing else 0
    assert 2 * saved - twice == pytest.approx(copies, rel=0.05)


def test_autocast_keeps_its_copies_until_forward_ends() -> None:
    """Checkpointing does not spare them: the cache of casts lasts as long as the autocast region."""
    model, load = small_model(), Load(1, 32, 1, StageConfig(dtype="bfloat16", gradient_checkpointing=True))
    stage = make_stage(model, MIDDLE, load.stage)
    batch, received = (
        random_microbatch((1, 32), model.vocabulary, torch.device("cpu")),
        torch.randn(1, 32, model.hidden),
    )
    copies = 2 * model.size(MIDDLE).layers_linear  # Before: it makes a block of its own, on no device.
    with LiveBytes() as live:
        output = stage.forward(batch, received)
        assert live.peak > copies > 3 * live.now
    del output


@pytest.mark.parametrize("spec", [FIRST, MIDDLE, LAST], ids=["first", "middle", "last"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_what_tensors_take(dtype: Any, checkpointing: bool, spec: BlockSpec) -> None:
    model, load = small_model(), Load(2, 256, 2, StageConfig(dtype=dtype, gradient_checkpointing=checkpointing))
    stage = make_stage(model, spec, load.stage)
    train_microbatch(stage, model, load)
    stage.step(0)
    train_microbatch(stage, model, load)
    live = LiveBytes()
    live.know([[parameter, parameter.grad] for parameter in optimizer_of(stage).parameters])
    live.know(list(optimizer_of(stage).inner.state.values()))
    state = live.now
    with live:
        train_microbatch(stage, model, load)
    memory = arithmetic.memory(model, load, spec, queue_depth=0)
    assert memory.state == pytest.approx(state, rel=0.001)
    assert memory.total == pytest.approx(live.peak, rel=0.1)
    # On a CPU the chunked loss has other accumulators in bfloat16 than on a GPU, which the formula is for.
    if not spec.is_last or dtype == "float32":
        assert memory.total - memory.state == pytest.approx(live.peak - state, rel=0.15)


@pytest.mark.parametrize("spec", [FIRST, MIDDLE, LAST], ids=["first", "middle", "last"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operations_are_what_pytorch_counts(dtype: Any, checkpointing: bool, spec: BlockSpec) -> None:
    model, load = small_model(), Load(2, 64, 1, StageConfig(dtype=dtype, gradient_checkpointing=checkpointing))
    stage = make_stage(model, spec, load.stage)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        train_microbatch(stage, model, load)
    counted = counter.get_total_flops()
    # This kernel computes the half of the attention that the causal mask drops, too.
    counted -= (4 if checkpointing else 3) * 3 * arithmetic.layer_operations(model, load)["attention"]
    if spec.is_last:
        # The counter does not look into PyTorch's chunked loss, but for the backward in bfloat16.
        product = 2 * model.hidden * model.vocabulary
        counted += (1 if dtype == "bfloat16" else 3) * load.microbatch * product
        # One token of each row has no target.
        counted += 3 * load.rows * product if dtype == "bfloat16" else 0
    assert arithmetic.operations(model, load, spec) == counted


@pytest.mark.parametrize(("k", "microbatches"), [(2, 2), (2, 8), (3, 5), (4, 4), (4, 18), (8, 8), (8, 35)])
def test_delay_of_1f1b_is_what_a_simulation_shows(k: int, microbatches: int) -> None:
    forward, backward, delay = 1.0, 2.0, 0.5
    without = simulate_1f1b(k, microbatches, forward, backward, 0.0, set())
    assert without == pytest.approx((microbatches + k - 1) * (forward + backward))
    assert 1 - microbatches * (forward + backward) / without == pytest.approx(arithmetic.bubble_1f1b(k, microbatches))
    added = simulate_1f1b(k, microbatches, forward, backward, delay, set(range(k - 1))) - without
    assert arithmetic.delay_1f1b(k, microbatches, delay) == pytest.approx(added, rel=0.1)
    for boundary in range(k - 1):
        added = simulate_1f1b(k, microbatches, forward, backward, delay, {boundary}) - without
        assert abs(arithmetic.delay_1f1b_at_one(k, microbatches, delay) - added) <= max(1, k - 2) * delay


def test_queue_depth_is_the_rule_of_the_flag() -> None:
    assert arithmetic.queue_depth(delay=0.0, microbatch=1.0) == 2
    assert arithmetic.queue_depth(delay=0.25, microbatch=0.2) == 5
    rule = "twice its one-way delay over a microbatch's time, plus 2"
    (field,) = (field for field in fields(PipelineConfig) if field.name == "queue_depth")
    assert rule in field.metadata["help"]

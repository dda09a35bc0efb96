"""What each stage of a run needs: memory, operations, bytes across the boundaries.

Parameters are counted (benchmarks/scaling/model_sizes.py). All else is a formula with its source in its docstring, for
decoder layers like Llama's: RMSNorm, grouped-query attention by a fused kernel, a gated MLP. Sizes are in bytes, times
in seconds, operations in floating-point operations (a multiplication and an addition are two).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scaling.model_sizes import Load, Model
from lopt_pp.model.partition import BlockSpec, split_at, split_evenly
from lopt_pp.objectives import CUDA_LOGITS
from lopt_pp.planning.balance import balance
from lopt_pp.planning.costs import Costs

# Memory.


def saved_per_layer(model: Model, load: Load) -> int:
    """What one layer keeps of a microbatch for its backward, without checkpointing.

    Per token, with d = hidden, q = heads x head size, k = the same of the keys, f = intermediate, and r and c the bytes
    of a number in the residual stream and in a matrix product:

        2 norms:     2 (4 + r) d + 8   the input in float32, the normalized input, one factor
        what enters the linear maps:   2 c d; under autocast 5 c d, since each of the 5 maps makes a copy of its own
        attention:   c (2 q + 2 k) + 4 heads   queries, keys, values, the result (which the output map shares), log-sums
        MLP:         4 c f             gate, its activation, up, their product

    Source: what autograd saves in transformers' LlamaDecoderLayer with a fused attention kernel
    (tests/benchmarks/test_scaling.py counts it).
    """
    r, c = load.residual_bytes, load.compute_bytes
    norms = 2 * (4 + r) * model.hidden + 8
    linear_inputs = (5 if load.stage.autocasts else 2) * c * model.hidden
    attention = 2 * c * (model.queries + model.keys) + 4 * model.heads
    return load.microbatch * (norms + linear_inputs + attention + 4 * c * model.intermediate)


def saved_by_layers(model: Model, load: Load, num_layers: int) -> int:
    """What a stage's layers keep of a microbatch from forward to backward; with checkpointing, each one's input."""
    if load.stage.gradient_checkpointing:
        return num_layers * load.microbatch * model.hidden * load.residual_bytes
    return num_layers * saved_per_layer(model, load)


def mlp_gradients(model: Model, load: Load) -> int:
    """What a layer's backward holds at its widest besides: the gradients of the MLP's product and of its factors, 3 c f
    per token."""
    return 3 * load.compute_bytes * load.microbatch * model.intermediate


def saved_by_reconstruction(model: Model, load: Load) -> int:
    """What the local head and its loss keep of a microbatch.

    Per token r d (the real tokens' hidden states) + c d (normalized) + c d/4 + c d/4 (around the GELU) + 8 d
    (prediction and target in float32); and under autocast a copy of the head's weights.
    """
    r, c, d = load.residual_bytes, load.compute_bytes, model.hidden
    copies = c * model.local_head if load.stage.autocasts else 0
    return load.microbatch * (r * d + c * d + 2 * c * (d // 4) + 8 * d) + copies


def held_by_task_loss(model: Model, load: Load) -> int:
    """The most that the final norm, the output head and the chunked loss hold of a microbatch, on a GPU.

    Per token (4 + 2 r) d (the norm's input and result, the rows with a target) + 2 c d (what enters the head, and its
    gradient). For the head's weight V d: under autocast a copy (c), the gradient in the same dtype (c) and in float32
    (4); without, one gradient beside the parameter's. One chunk of logits in float32, and rounded where c is 2.

    Source: torch.nn.functional.linear_cross_entropy of PyTorch 2.13, accumulation "compact"; `lopt_pp.objectives`.
    """
    r, c, d = load.residual_bytes, load.compute_bytes, model.hidden
    weight = model.vocabulary * d * (2 * c + 4 if load.stage.autocasts else c)
    chunk = min(load.microbatch, max(1, CUDA_LOGITS // model.vocabulary))
    logits = chunk * model.vocabulary * (4 + (c if c < 4 else 0))
    return load.microbatch * ((4 + 2 * r) * d + 2 * c * d) + weight + logits


def message_bytes(model: Model, load: Load) -> int:
    """What crosses a boundary for a microbatch: rows x tokens x hidden numbers in the compute dtype."""
    return load.microbatch * model.hidden * load.compute_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage's process holds, by what they are for.

    Attributes:
        weights, gradients, optimizer: this process's share. AdamW keeps two numbers for each parameter.
        gathered: with sharding, parameters and gradients of two layers, embeddings and output head, whole.
        copies: of the linear maps' weights in bfloat16, which autocast makes in each forward and keeps until its end
            (or, without checkpointing, until their backward). Sharding does not divide them.
        kept: by the layers, of the one microbatch, from forward to backward.
        passing: the most that comes and goes besides: the loss, or one layer at work, and its copies.
        queue: hidden states that wait or are on their way, `queue_depth` at each end.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    copies: int
    kept: int
    passing: int
    queue: int

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """At the fullest moment of a microbatch that is not the first of its step."""
        return self.state + self.gathered + self.copies + self.kept + self.passing + self.queue


def memory(model: Model, load: Load, spec: BlockSpec, queue_depth: int) -> Memory:
    """What a stage's process holds.

    At the fullest moment, without checkpointing: everything that the layers keep and all copies, with the loss or the
    gradients of an MLP. With checkpointing, the fullest of three: the end of forward (a layer at work, and all copies);
    the loss; and the backward of a layer (what it keeps, computed again; its copies; the gradients of its MLP).
    """
    size = model.size(spec)
    shards = load.data_parallel if load.sharding == "full" else 1
    weights = math.ceil(size.total / shards) * load.residual_bytes
    around = size.block - size.num_layers * size.layer
    gathered = 2 * load.residual_bytes * (min(2, size.num_layers) * size.layer + around) if shards > 1 else 0
    copies = load.compute_bytes * size.layers_linear if load.stage.autocasts else 0
    kept = saved_by_layers(model, load, size.num_layers)
    loss = held_by_task_loss(model, load) if spec.is_last else saved_by_reconstruction(model, load)
    if load.stage.gradient_checkpointing:
        layer = saved_per_layer(model, load)
        forward, backward = (copies, layer), (copies // size.num_layers, layer + mlp_gradients(model, load))
        copies, passing = max(forward, (0, loss), backward, key=sum)
    else:
        passing = max(loss, mlp_gradients(model, load))
    queue = ((not spec.is_first) + (not spec.is_last)) * queue_depth * message_bytes(model, load)
    return Memory(weights, weights, 2 * weights, gathered, copies, kept, passing, queue)


# Computation.


def layer_operations(model: Model, load: Load) -> dict[str, int]:
    """Operations of one layer's forward on a microbatch: two per weight and token, and the causal half of attention."""
    d, n = model.hidden, load.microbatch
    return {
        "queries_keys_values": 2 * n * d * (model.queries + 2 * model.keys),
        "attention": 2 * n * load.tokens * model.queries,
        "attention_output": 2 * n * model.queries * d,
        "gate_up": 4 * n * d * model.intermediate,
        "down": 2 * n * d * model.intermediate,
    }


def operations(model: Model, load: Load, spec: BlockSpec) -> int:
    """Operations of a stage for one microbatch, forward and backward.

    Backward has two products for each of forward's: the gradients of the weight and of the input. (That what a later
    stage receives is detached saves none: the first norm's weight needs the gradient of what the norm gives.) With
    checkpointing the layers run forward again, but for the last map, whose result no backward needs. The chunked loss
    in bfloat16 makes its logits twice (`reduction="none"`).
    """
    layer, num_layers = layer_operations(model, load), spec.stop - spec.start
    forward = sum(layer.values())
    count = 3 * num_layers * forward
    if load.stage.gradient_checkpointing:
        count += num_layers * (forward - layer["down"])
    if spec.is_last:
        products = 3 if load.compute_bytes == 4 else 4
        return count + products * 2 * load.microbatch * model.hidden * model.vocabulary
    return count + 3 * 4 * load.microbatch * model.hidden * (model.hidden // 4)


def optimizer_seconds(parameters: float, load: Load, bandwidth: float) -> float:
    """An optimizer step at the memory's bandwidth: the gradient's norm (1 read), clipping (2), and AdamW, which reads
    weight, gradient and two moments and writes all but the gradient (7).

    Args:
        parameters: of this process.
        load: for the bytes of a parameter.
        bandwidth: of the GPU's memory, in bytes per second.
    """
    return 10 * parameters * load.residual_bytes / bandwidth


def balanced(model: Model, load: Load, num_stages: int) -> tuple[BlockSpec, ...]:
    """The cuts of `--split auto`, with operations in the place of measured seconds (the optimizer's are left out)."""
    depth = model.num_layers
    specs = BlockSpec(1, 3, 0, 1), BlockSpec(1, 2, depth - 1, depth)
    middle, last = (operations(model, load, spec) for spec in specs)
    head = 12 * load.microbatch * model.hidden * (model.hidden // 4)
    layer = float(middle - head)
    costs = Costs((layer,) * depth, (layer,) * depth, embedding=0.0, local_head=float(head), output=last - layer)
    return balance(costs, [1] * num_stages)


def spans_of(model: Model, load: Load, num_stages: int, split: str) -> tuple[BlockSpec, ...]:
    """The blocks that `--split midpoint`, `auto` or a list of first layers makes."""
    if split == "auto":
        return balanced(model, load, num_stages)
    if split == "midpoint":
        return split_evenly(model.num_layers, num_stages)
    return split_at([int(number) for number in split.split(",")], model.num_layers)


# Communication.


def queue_depth(delay: float, microbatch: float) -> int:
    """The `--queue_depth` that hides a link: the rule in that flag's help, measured by benchmarks/network/slow_link.py.

    Args:
        delay: one way.
        microbatch: between two messages: the busiest stage's time for a microbatch, or the transfer if that is longer.
    """
    return math.ceil(2 * delay / microbatch) + 2


def replica_traffic(parameters: int, load: Load) -> tuple[float, float]:
    """Bytes that a process sends (and receives) to keep its stage's replicas alike: per microbatch, and per step.

    DDP sends 2 (d - 1)/d of the gradient once per step (ring all-reduce). FSDP2 sends (d - 1)/d of the stage in each
    microbatch for each of two all-gathers of the weights and a reduce-scatter of the gradients, in the dtype of the
    weights. (Embeddings and output head are gathered once and not twice: they are kept between forward and backward.)
    """
    share = (load.data_parallel - 1) / load.data_parallel * parameters * load.residual_bytes
    return (3 * share, 0.0) if load.sharding == "full" else (0.0, 2 * share)


# The same model trained end to end by 1F1B.


def bubble_1f1b(num_stages: int, microbatches: int) -> float:
    """The share of a step in which a stage waits. Source: Narayanan et al., arXiv 2104.04473, section 2.2."""
    return (num_stages - 1) / (microbatches + num_stages - 1)


def delay_1f1b(num_stages: int, microbatches: int, delay: float) -> float:
    """Seconds that a delay at every boundary adds to each step of 1F1B, about.

    The step begins and ends with a way through all stages: k - 1 delays forward, k - 1 back. Between them a microbatch
    and its gradient go there and back for every k microbatches, since the first stage has k on their way. With M
    microbatches that is 2 ((k - 1) M/k + k - 2) delays (tests/benchmarks/test_scaling.py simulates it). It takes
    transfers that overlap computation, and stages that are equally long.

    Args:
        num_stages: k, at least 2.
        microbatches: M, at least k.
        delay: one way.
    """
    return 2 * ((num_stages - 1) * microbatches / num_stages + num_stages - 2) * delay if num_stages > 1 else 0.0


def delay_1f1b_at_one(num_stages: int, microbatches: int, delay: float) -> float:
    """The same where one boundary has the delay: about one delay per microbatch, at most.

    The two stages beside it alternate forward and backward: between a backward of the stage before it and the next but
    one, a hidden state crosses and a gradient comes back. So two microbatches take their work and two delays.
    """
    return microbatches * delay if num_stages > 1 else 0.0


def kept_1f1b(model: Model, load: Load, specs: Sequence[BlockSpec]) -> int:
    """What the layers of 1F1B's first stage keep: of as many microbatches as there are stages (or are in a step)."""
    in_flight = min(len(specs), load.accumulation)
    return in_flight * saved_by_layers(model, load, specs[0].stop - specs[0].start)

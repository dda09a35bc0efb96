"""What is counted is what PyTorch's own counters count, and what they do not see into besides."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lopt_pp.planning.memory_tracker import MemoryTracker

CPU = torch.device("cpu")


class Layers(nn.Module):
    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        self.checkpointing = checkpointing

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            inputs = inputs + (checkpoint(layer, inputs, use_reentrant=False) if self.checkpointing else layer(inputs))
        return inputs


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_and_operations_are_those_of_pytorchs_own_counters(checkpointing: bool) -> None:
    model, inputs = Layers(checkpointing), torch.randn(32, 64)

    def train() -> None:
        model(inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    train()
    tracker = MemoryTracker()
    tracker.note(list(model.parameters()), "weights")
    with tracker:
        train()
    theirs = MemTracker()
    theirs.track_external(model)
    with theirs:
        train()
    expected = theirs.get_tracker_snapshot("peak")[CPU]["Total"]
    # The tracker also knows the input, which was there before.
    assert tracker.peak.total() == pytest.approx(expected, abs=inputs.nbytes)
    with FlopCounterMode(display=False) as counter:
        train()
    assert tracker.operations == counter.get_total_flops() > 0


def test_what_is_freed_is_no_longer_there_and_the_peak_remembers_it() -> None:
    tracker = MemoryTracker()
    with tracker:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second.view(10, 100)
    assert tracker.live == {"activations": 4000} and tracker.peak == {"activations": 8000}
    tracker.forget_peak()
    assert tracker.peak == {"activations": 4000}
    del second, third
    gc.collect()
    assert tracker.live.total() == 0


def test_a_tensor_can_turn_out_to_be_a_gradient() -> None:
    weight, tracker = nn.Parameter(torch.ones(8, 8)), MemoryTracker()
    tracker.note(weight, "weights")
    weight.register_post_accumulate_grad_hook(lambda own: tracker.note(own.grad, "gradients"))
    with tracker:
        (weight * 2).sum().backward()
    assert (tracker.live["weights"], tracker.live["gradients"], tracker.live["activations"]) == (256, 256, 0)


def test_memory_is_given_out_in_pieces() -> None:
    tracker = MemoryTracker(multiple=512)
    with tracker:
        small, large = torch.zeros(3), torch.zeros(129)
    assert tracker.live.total() == 512 + 1024
    del small, large


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch before 2.13")
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_chunked_loss_is_seen_into(reduction: str) -> None:
    tokens, hidden, vocabulary, chunk = 64, 16, 1000, 8
    features, weight = torch.randn(tokens, hidden, requires_grad=True), nn.Parameter(torch.randn(vocabulary, hidden))
    targets, tracker = torch.randint(vocabulary, (tokens,)), MemoryTracker()
    with tracker:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        F.linear_cross_entropy(features, weight, targets, reduction=reduction, options=options).sum().backward()
    product = 2 * tokens * hidden * vocabulary
    assert tracker.operations == (3 if reduction == "sum" else 4) * product
    logits, gradient = 4 * chunk * vocabulary, weight.nbytes
    assert logits + gradient < tracker.peak.total() < 4 * tokens * vocabulary + gradient


def test_fused_attention_counts_the_half_that_the_mask_leaves() -> None:
    rows, heads, keys, tokens, width = 2, 4, 2, 32, 16
    query = torch.randn(rows, heads, tokens, width, requires_grad=True)
    key, value = torch.randn(2, rows, keys, tokens, width, requires_grad=True).unbind()
    counted = {}
    for is_causal in (False, True):
        tracker = MemoryTracker()
        with tracker, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            result = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)
            forward = tracker.operations
            result.sum().backward()
        counted[is_causal] = forward, tracker.operations - forward
    product = 2 * rows * heads * tokens * tokens * width
    assert counted[False] == (2 * product, 5 * product)
    assert counted[True] == (product, 5 * product // 2)

"""The reconstruction loss against its formula, computed plainly."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocks import weight_of
from microbatch import HIDDEN, LENGTHS, gradient, make_batch, random_output
from small_stages import counts_of
from torch import nn

from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives import ObjectiveConfig, Reconstruction, Site, nothing_to_load


def make_reconstruction(seed: int = 0, size: int = HIDDEN) -> Reconstruction:
    block: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(hidden_size=size)))
    return Reconstruction(Site(block, ObjectiveConfig(), torch.Generator().manual_seed(seed), nothing_to_load))


@pytest.fixture
def output() -> BlockOutput:
    return random_output()


def perturb_heads(objective: Reconstruction) -> None:
    """Moves the head off its initial values: zeros and ones hide mistakes."""
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)


def plain_reconstruction(objective: Reconstruction, output: BlockOutput) -> torch.Tensor:
    """Token by token: LayerNorm, down to a quarter, GELU, up again, and the mean squared error over the hidden size."""
    norm_weight, norm_bias, down_weight, down_bias, up_weight, up_bias = objective.parameters()
    total = torch.zeros(())
    for row, length in enumerate(LENGTHS):
        for token, target in zip(output.hidden_states[row, :length], output.inputs[row, :length], strict=True):
            centred = token - token.mean()
            hidden = centred / (centred.pow(2).mean() + 1e-5).sqrt() * norm_weight + norm_bias
            hidden = down_weight @ hidden + down_bias
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            total = total + (up_weight @ hidden + up_bias - target).pow(2).sum() / HIDDEN
    return total


def test_reconstruction_is_the_formula(output: BlockOutput) -> None:
    objective = make_reconstruction()
    perturb_heads(objective)
    loss, expected = objective(output, make_batch()), plain_reconstruction(objective, output)
    assert objective.count(counts_of(make_batch())) == 14
    assert [list(parameter.shape) for parameter in objective.head[1].parameters()] == [[8, 32], [8]]
    torch.testing.assert_close(loss, expected)
    variables = [output.hidden_states, *objective.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, variables), torch.autograd.grad(expected, variables))


def test_padding_does_not_count_in_reconstruction(output: BlockOutput) -> None:
    objective, batch = make_reconstruction(), make_batch()
    perturb_heads(objective)
    padding = ~batch.token_mask
    changed = BlockOutput(output.inputs.clone(), output.hidden_states.detach().clone(), None)
    changed.inputs[padding] = 1e6
    changed.hidden_states[padding] = float("nan")
    changed.hidden_states.requires_grad_()
    loss, other = objective(output, batch), objective(changed, batch)
    assert torch.equal(loss, other)
    gradients = [gradient(loss, output.hidden_states), gradient(other, changed.hidden_states)]
    assert torch.equal(*gradients)
    assert not gradients[0][padding].any() and gradients[0][batch.token_mask].all()


def test_the_target_is_in_float32_under_autocast(output: BlockOutput) -> None:
    """1.001 is 1.0 in bfloat16."""
    objective, batch = make_reconstruction(), make_batch()
    target = BlockOutput(torch.full_like(output.inputs, 1.001), output.hidden_states, None)
    nn.init.zeros_(weight_of(objective.head[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(target, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(1.001**2 * 14))


def test_head_starts_small() -> None:
    """Xavier-uniform with gain 0.1, zero biases, a plain LayerNorm."""
    size = 256
    norm, down, _, up = make_reconstruction(size=size).head
    for linear in (down, up):
        bound = 0.1 * math.sqrt(6 / (size + size // 4))
        assert isinstance(linear, nn.Linear)
        assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not linear.bias.any()
    assert isinstance(norm, nn.LayerNorm)
    assert torch.equal(norm.weight, torch.ones(size)) and not norm.bias.any()


def test_head_is_drawn_from_its_own_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(make_reconstruction(seed).parameters())

    torch.manual_seed(0)
    first = weights(5)
    torch.manual_seed(1)
    assert torch.equal(weights(5), first)
    assert not torch.equal(weights(6), first)

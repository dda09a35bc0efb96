"""The local losses against their formulas, computed plainly."""

import math

import pytest
import torch
from torch import nn

from lopt_pp import objectives
from lopt_pp.data import Microbatch
from lopt_pp.errors import LoptError
from lopt_pp.objectives import NextToken, ObjectiveConfig, Reconstruction, linear_cross_entropy
from lopt_pp.split import BlockOutput

HIDDEN, VOCABULARY = 32, 11

# Three rows of 6, 3 and 5 tokens; the second has no target.
LENGTHS = [6, 3, 5]
LABELS = [[-100, -100, -100, 4, 5, 6], [-100, -100, -100, -100, -100, -100], [7, 8, -100, 9, 10, -100]]
TARGETS = [(0, 3, 4), (0, 4, 5), (0, 5, 6), (2, 1, 8), (2, 3, 9), (2, 4, 10)]
"""Row, place and id of each token with a loss; the first of a row is never predicted."""


def make_batch(labels: list[list[int]] = LABELS) -> Microbatch:
    token_mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    has_target = torch.tensor(labels)[:, 1:] != -100
    return Microbatch(
        step=0,
        index=0,
        input_ids=torch.where(token_mask, 3, 0),
        labels=torch.tensor(labels),
        token_mask=token_mask,
        target_positions=has_target.any(dim=0).nonzero().squeeze(1),
        num_tokens=sum(LENGTHS),
        num_targets=int(has_target.sum()),
    )


def make_reconstruction(seed: int = 0, size: int = HIDDEN) -> Reconstruction:
    return Reconstruction(size, 10.0, torch.Generator().manual_seed(seed))


@pytest.fixture
def output() -> BlockOutput:
    """Of a block that has both losses: random hidden states, and logits of the places before some target."""
    torch.manual_seed(0)
    shape = len(LENGTHS), max(LENGTHS)
    hidden_states = torch.randn(*shape, HIDDEN, requires_grad=True)
    logits = torch.randn(shape[0], len(make_batch().target_positions), VOCABULARY, requires_grad=True)
    return BlockOutput(torch.randn(*shape, HIDDEN), hidden_states, logits)


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


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
    assert objective.count(make_batch()) == 14
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
    nn.init.zeros_(objective.head[-1].weight)
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
        assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not linear.bias.any()
    assert torch.equal(norm.weight, torch.ones(size)) and not norm.bias.any()


def test_head_is_drawn_from_its_own_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(make_reconstruction(seed).parameters())

    torch.manual_seed(0)
    first = weights(5)
    torch.manual_seed(1)
    assert torch.equal(weights(5), first)
    assert not torch.equal(weights(6), first)


def test_next_token_is_the_formula(output: BlockOutput) -> None:
    assert output.logits is not None
    objective, batch = NextToken(), make_batch()
    kept = batch.target_positions.tolist()
    assert kept == [0, 2, 3, 4]
    places = [(row, kept.index(place - 1), token) for row, place, token in TARGETS]
    expected = -sum(output.logits[row, column].log_softmax(-1)[token] for row, column, token in places)
    loss = objective(output, batch)
    assert objective.count(batch) == len(TARGETS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, output.logits), gradient(expected, output.logits))


def test_logits_without_a_target_do_not_count(output: BlockOutput) -> None:
    """Places that are kept for the target of another row, padding among them."""
    assert output.logits is not None
    batch = make_batch()
    counted = torch.zeros(output.logits.shape[:2], dtype=torch.bool)
    for row, place, _ in TARGETS:
        counted[row, batch.target_positions.tolist().index(place - 1)] = True
    changed = output.logits.detach().clone()
    changed[~counted] = 100.0
    changed.requires_grad_()
    loss, other = NextToken()(output, batch), NextToken()(BlockOutput(output.inputs, output.inputs, changed), batch)
    assert torch.equal(loss, other)
    assert torch.equal(gradient(loss, output.logits), gradient(other, changed))
    assert not gradient(NextToken()(output, batch), output.logits)[~counted].any()


def test_logits_are_read_in_float32(output: BlockOutput) -> None:
    assert output.logits is not None
    half = output.logits.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = NextToken()(BlockOutput(output.inputs, output.inputs, half), make_batch())
    expected = NextToken()(BlockOutput(output.inputs, output.inputs, half.float()), make_batch())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_a_microbatch_without_a_target(output: BlockOutput) -> None:
    batch = make_batch([[-100] * 6] * 3)
    logits = torch.randn(3, 0, VOCABULARY, requires_grad=True)
    loss = NextToken()(BlockOutput(output.inputs, output.inputs, logits), batch)
    assert batch.num_targets == 0 and loss.item() == 0.0
    assert gradient(loss, logits).shape == (3, 0, VOCABULARY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_loss_is_the_formula(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool) -> None:
    """In chunks of 8 of 37 tokens. In bfloat16 the products are rounded, and the sum of the losses is not."""
    monkeypatch.setattr(objectives, "_CPU_LOGITS", 8 * 200)
    torch.manual_seed(0)
    features, weight = torch.randn(37, HIDDEN, requires_grad=True), torch.randn(200, HIDDEN, requires_grad=True)
    constant = torch.randn(200, requires_grad=True) if bias else None
    targets = torch.randint(200, (37,))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss = linear_cross_entropy(features, weight, constant, targets)
        logits = nn.functional.linear(features, weight, constant)
    expected = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=0)
    variables = [features, weight] + ([constant] if constant is not None else [])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        torch.autograd.grad(loss, variables), torch.autograd.grad(expected, variables), rtol=tolerance, atol=tolerance
    )


def test_the_logits_left_to_the_loss_give_the_same(output: BlockOutput) -> None:
    """From the features and the head, at the tokens with a target; a head of its own gets its gradient."""
    batch, head = make_batch(), nn.Linear(HIDDEN, VOCABULARY)
    features = output.hidden_states
    left = BlockOutput(output.inputs, features, None, features, head)
    made = BlockOutput(output.inputs, features, head(features)[:, batch.target_positions])
    loss, expected = NextToken()(left, batch), NextToken()(made, batch)
    torch.testing.assert_close(loss, expected)
    variables = [features, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, variables), torch.autograd.grad(expected, variables))
    nothing = make_batch([[-100] * 6] * 3)
    assert NextToken()(left, nothing).item() == 0.0


def test_reconstruction_weight_is_at_least_0() -> None:
    assert ObjectiveConfig().reconstruction_weight == 10.0
    assert ObjectiveConfig(reconstruction_weight=0.0).reconstruction_weight == 0.0
    with pytest.raises(LoptError, match="^--reconstruction_weight -0.5: at least 0$"):
        ObjectiveConfig(reconstruction_weight=-0.5)

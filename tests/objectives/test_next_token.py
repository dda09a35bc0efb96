"""The loss of the next token against its formula, computed plainly."""

from typing import Any

import pytest
import torch
from microbatch import HIDDEN, TARGETS, VOCABULARY, gradient, make_batch, random_output
from small_stages import counts_of
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives import NextToken, ObjectiveConfig, next_token
from lopt_pp.objectives.next_token import linear_cross_entropy


@pytest.fixture
def output() -> BlockOutput:
    return random_output()


def test_next_token_is_the_formula(output: BlockOutput) -> None:
    assert output.logits is not None
    objective, batch = NextToken(), make_batch()
    kept = batch.target_positions.tolist()
    assert kept == [0, 2, 3, 4]
    places = [(row, kept.index(place - 1), token) for row, place, token in TARGETS]
    expected = -torch.stack([output.logits[row, column].log_softmax(-1)[token] for row, column, token in places]).sum()
    loss = objective(output, batch)
    assert objective.count(counts_of(batch)) == len(TARGETS)
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
    monkeypatch.setattr(next_token, "CPU_LOGITS", 8 * 200)
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


@pytest.mark.parametrize("plain_head", [False, True])
@pytest.mark.parametrize("flags", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}])
def test_other_losses_are_those_of_transformers_and_trl(plain_head: bool, flags: dict[str, Any]) -> None:
    """In training; measured, the loss is the plain one."""
    torch.manual_seed(0)
    batch, head = make_batch(), nn.Linear(HIDDEN, VOCABULARY)
    features = torch.randn(*batch.input_ids.shape, HIDDEN, requires_grad=True)
    logits = head(features)
    output = BlockOutput(features, features, logits[:, batch.target_positions])
    if plain_head:
        output = BlockOutput(features, features, None, features, head)
    objective = NextToken(ObjectiveConfig(**flags))
    loss = objective(output, batch)
    logits = head(features)
    if flags.get("loss_type") == "dft":
        shifted, targets = logits[:, :-1], batch.labels[:, 1:]
        logps = shifted.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        expected = -(logps.exp().detach() * logps)[targets != -100].sum()
    else:
        mean = LabelSmoother(epsilon=0.1)({"logits": logits}, batch.labels, shift_labels=True)
        expected = mean * batch.num_targets
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(loss, features), gradient(expected, features))
    assert torch.equal(objective.eval()(output, batch), NextToken()(output, batch)) and not torch.equal(
        loss, NextToken()(output, batch)
    )

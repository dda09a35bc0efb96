"""What is said of single tokens against the formulas, from logits and from what enters the head."""

import pytest
import torch
from microbatch import HIDDEN, TARGETS, VOCABULARY, make_batch, random_output
from torch import nn
from torch.distributions import Categorical

from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives import NextToken, token_losses
from lopt_pp.objectives.token_losses import linear_token_losses
from lopt_pp.objectives.token_losses import token_losses as of_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_the_formulas(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In chunks of 8 of 37 tokens; in bfloat16 logits are rounded, and what is made of them is not."""
    monkeypatch.setattr(token_losses, "CPU_LOGITS", 2 * 8 * 200)
    torch.manual_seed(0)
    features, weight, bias = torch.randn(37, HIDDEN), torch.randn(200, HIDDEN), torch.randn(200)
    targets = torch.randint(200, (37,))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        found = linear_token_losses(features, weight, bias, targets, entropies=True)
        logits = nn.functional.linear(features, weight, bias).float()
    torch.testing.assert_close(found.losses, nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(found.likeliest, logits.argmax(-1)) and found.entropies is not None
    torch.testing.assert_close(found.entropies, Categorical(logits=logits).entropy())


def test_they_are_of_the_targets_of_a_microbatch() -> None:
    """In their order, whether the logits are there or left to the loss; they add up to it, without a gradient."""
    output, batch, head = random_output(), make_batch(), nn.Linear(HIDDEN, VOCABULARY)
    left = BlockOutput(output.inputs, output.hidden_states, None, output.hidden_states, head)
    logits = head(output.hidden_states)
    made = BlockOutput(output.inputs, output.hidden_states, logits[:, batch.target_positions])
    expected = torch.stack([-logits[row, place - 1].log_softmax(-1)[token] for row, place, token in TARGETS])
    for which in (left, made):
        found = of_batch(which, batch)
        torch.testing.assert_close(found.losses, expected.detach())
        torch.testing.assert_close(found.losses.sum(), NextToken()(which, batch).detach())
        assert found.likeliest.tolist() == [int(logits[row, place - 1].argmax()) for row, place, _ in TARGETS]
        assert found.entropies is None and not found.losses.requires_grad


def test_a_microbatch_without_a_target() -> None:
    output, batch, head = random_output(), make_batch([[-100] * 6] * 3), nn.Linear(HIDDEN, VOCABULARY)
    left = BlockOutput(output.inputs, output.hidden_states, None, output.hidden_states, head)
    made = BlockOutput(output.inputs, output.hidden_states, torch.randn(3, 0, VOCABULARY))
    for which in (left, made):
        found = of_batch(which, batch, entropies=True)
        assert found.losses.shape == found.likeliest.shape == (0,)

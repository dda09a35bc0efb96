"""When a stage learns, and what of it: warm-up of its head, which microbatches it learns from, what is frozen."""

import dataclasses
from pathlib import Path

import pytest
import torch
from blocks import weight_of
from small_stages import (
    LAST,
    accumulate,
    equal,
    make_stage,
    make_warming_stage,
    microbatches,
    objective_of,
    optimizer_of,
    values,
)
from tiny import write_model

from lopt_pp.objectives import ObjectiveConfig


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


OBJECTIVES = {
    "reconstruction": ObjectiveConfig(),
    "next token": ObjectiveConfig(local_objective="next_token"),
    "own": ObjectiveConfig(local_objective="own_objective:TokenItself"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_block_is_frozen_while_its_head_warms_up(llama: Path, name: str) -> None:
    """To the bit, weight decay and moments included; then it learns at the rate of the schedule."""
    stage = make_warming_stage(llama, OBJECTIVES[name], steps=2)
    block, head = dict(stage.block.named_parameters()), dict(objective_of(stage).named_parameters())
    head = {name: parameter for name, parameter in head.items() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in block.items()}
    rates = []
    for step in range(4):
        assert stage.block_learns == (step >= 2)
        start = {name: parameter.detach().clone() for name, parameter in head.items()}
        accumulate(stage, microbatches(step=step))
        assert all((parameter.grad is not None) == (step >= 2) for parameter in block.values())
        rates.append(stage.step(step)["learning_rate"])
        assert not any(torch.equal(parameter, start[name]) for name, parameter in head.items())
        unchanged = [torch.equal(parameter, before[name]) for name, parameter in block.items()]
        assert all(unchanged) if step < 2 else not any(unchanged)
    share = objective_of(stage).rate_share
    assert rates == pytest.approx([0, 0, 1e-2 * share * 8 / 10, 1e-2 * share * 7 / 10])
    assert {float(optimizer_of(stage).state_of(parameter)["step"]) for parameter in block.values()} == {2.0}


def test_a_head_warms_up_at_a_rate_of_its_own(llama: Path) -> None:
    """The first step of Adam moves each number by the rate, or nothing."""
    rate = 3e-3
    stage = make_warming_stage(llama, ObjectiveConfig(), local_head_learning_rate=rate, weight_decay=0.0)
    start = {name: parameter.detach().clone() for name, parameter in objective_of(stage).named_parameters()}
    accumulate(stage, microbatches())
    stage.step(0)
    for name, parameter in objective_of(stage).named_parameters():
        assert (parameter - start[name]).abs().max().item() == pytest.approx(rate, rel=1e-2)


def test_an_objective_without_a_head_has_nothing_to_warm_up(llama: Path) -> None:
    stage = make_warming_stage(llama, ObjectiveConfig(local_objective="own_objective:Small"))
    assert stage.block_learns
    accumulate(stage, microbatches())
    assert stage.step(0)["size_loss"] > 0


@pytest.mark.parametrize(("learned", "num_microbatches"), [(1, 2), (2, 3), (3, 3), (2, 5), (4, 2)])
def test_each_microbatch_is_learned_from_as_often(llama: Path, learned: int, num_microbatches: int) -> None:
    stage = make_warming_stage(llama, ObjectiveConfig(), local_accumulation_steps=learned)
    number = min(learned, num_microbatches)
    learned_in = [stage.learned_microbatches(step, num_microbatches) for step in range(num_microbatches)]
    assert all(len(set(own)) == number and own == sorted(own) for own in learned_in)
    for index in range(num_microbatches):
        assert sum(index in own for own in learned_in) == number
    assert stage.learned_share(num_microbatches) == number / num_microbatches
    last = make_stage(llama, LAST)
    assert (
        last.learned_microbatches(7, num_microbatches) == [*range(num_microbatches)]
        and last.learned_share(num_microbatches) == 1
    )


def test_what_is_not_learned_from_goes_forward_alike(llama: Path) -> None:
    stage = make_warming_stage(llama, ObjectiveConfig(), steps=0)
    (batch,) = microbatches()[:1]
    output, plain = stage.forward(batch, None), stage.forward(batch, None, learns=False)
    assert torch.equal(output.hidden_states, plain.hidden_states)
    assert output.hidden_states.requires_grad and not plain.hidden_states.requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_embeddings_may_be_frozen(llama: Path, name: str) -> None:
    stage = make_warming_stage(llama, dataclasses.replace(OBJECTIVES[name], train_embeddings=False), steps=0)
    embedding = weight_of(stage.block.model.get_input_embeddings())
    before = values(stage)
    accumulate(stage, microbatches())
    stage.step(0)
    after = values(stage)
    assert [name for name in before if torch.equal(before[name], after[name])] == ["model.model.embed_tokens.weight"]
    assert embedding.grad is None and not optimizer_of(stage).state_of(embedding)


def test_freezing_ends_the_learning(llama: Path) -> None:
    """Between two steps; what the block gives from then on is what it gave, and it can be saved and gone on from."""
    stage = make_warming_stage(llama, ObjectiveConfig(), steps=0)
    accumulate(stage, microbatches())
    stage.step(0)
    before = values(stage)
    stage.freeze()
    [batch] = microbatches(batch_size=4, step=1)
    output = stage.forward(batch, None)
    assert not stage.learns and not stage.block_learns and not output.hidden_states.requires_grad
    assert stage.step(1) == {} and stage.steps_done == 2
    kept = {name: value for name, value in before.items() if not name.startswith("head.")}
    assert equal(values(stage), kept)

    state = stage.state()
    assert not any(name.startswith(("objective.", "exp_avg.")) for name in state)
    other = make_warming_stage(llama, ObjectiveConfig(), steps=0)
    other.resume(state, 2)
    assert not other.learns and other.steps_done == 2 and equal(values(other), kept)
    assert other.state().keys() == state.keys()
    assert torch.equal(other.forward(batch, None).hidden_states, output.hidden_states)

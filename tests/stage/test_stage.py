"""One stage by itself: its losses, its step, its randomness and its dtypes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from small_stages import (
    FIRST,
    HIDDEN,
    LAST,
    accumulate,
    counts_of,
    equal,
    gradients,
    make_block,
    make_stage,
    microbatches,
    objective_of,
    optimizer_of,
    parameters,
    received,
    values,
)
from tiny import write_model
from torch import nn

from lopt_pp.data import Microbatch
from lopt_pp.errors import NotFiniteError
from lopt_pp.model.partition import BlockSpec, split_evenly
from lopt_pp.objectives import NextToken, ObjectiveConfig, Reconstruction, local_objective
from lopt_pp.stage.stage import Stage


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpt2"), "gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


def test_the_last_block_learns_the_task_and_the_others_reconstruct(llama: Path) -> None:
    for spec in split_evenly(4, 3):
        objective = local_objective(make_block(llama, spec), ObjectiveConfig(reconstruction_weight=7.0), seed=0)
        assert isinstance(objective, NextToken if spec.is_last else Reconstruction)
        assert objective.weight == (1.0 if spec.is_last else 7.0)


def test_heads_are_drawn_by_seed_and_stage(llama: Path) -> None:
    def head(seed: int, stage: int) -> torch.Tensor:
        objective = local_objective(make_block(llama, split_evenly(4, 3)[stage]), ObjectiveConfig(), seed)
        assert isinstance(objective, Reconstruction)
        return nn.utils.parameters_to_vector(objective.parameters())

    assert torch.equal(head(3, 0), head(3, 0))
    assert not torch.equal(head(3, 0), head(4, 0))
    assert not torch.equal(head(3, 0), head(3, 1))


@pytest.mark.parametrize("spec", [FIRST, LAST], ids=["first", "last"])
def test_losses_are_means_over_the_tokens_of_the_whole_step(llama: Path, spec: BlockSpec) -> None:
    """However the step is cut into microbatches, and not the mean of their means."""
    cut, whole = make_stage(llama, spec), make_stage(llama, spec)
    batches, batch = microbatches(batch_size=2), microbatches(batch_size=4)
    accumulate(cut, batches)
    accumulate(whole, batch)
    torch.testing.assert_close(gradients(cut), gradients(whole), rtol=1e-4, atol=1e-7)
    name = objective_of(cut).name
    loss = cut.step(0)[name]
    assert loss == pytest.approx(whole.step(0)[name], rel=1e-5)

    means = []
    for part in batches:
        accumulate(cut := make_stage(llama, spec), [part])
        means.append(cut.step(0)[name])
    counts = [objective_of(cut).count(counts_of(part)) for part in batches]
    assert loss == pytest.approx(sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts), rel=1e-5)
    assert loss != pytest.approx(sum(means) / 2, rel=1e-3), "the test could not tell a mean of means"


def test_the_weight_multiplies_the_gradient_but_not_the_report(llama: Path) -> None:
    stages = [make_stage(llama, FIRST) for _ in range(2)]
    objective_of(stages[1]).weight = 40.0
    for stage in stages:
        accumulate(stage, microbatches())
    once, four_times = (gradients(stage) for stage in stages)
    torch.testing.assert_close({name: grad * 4 for name, grad in once.items()}, four_times)
    first, second = (stage.step(0) for stage in stages)
    assert first["reconstruction_loss"] == second["reconstruction_loss"]
    assert second["grad_norm"] == pytest.approx(4 * first["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("spec", [FIRST, LAST], ids=["first", "last"])
def test_padding_changes_nothing(llama: Path, spec: BlockSpec) -> None:
    batches = microbatches()
    other_ids = [dataclasses.replace(b, input_ids=b.input_ids.where(b.token_mask, 17)) for b in batches]
    assert not torch.equal(other_ids[0].input_ids, batches[0].input_ids)
    stages = [make_stage(llama, spec) for _ in range(2)]
    for stage, parts in zip(stages, (batches, other_ids), strict=True):
        accumulate(stage, parts)
    first, second = map(gradients, stages)
    assert equal(first, second) and all(grad.any() for grad in first.values())
    assert stages[0].step(0) == stages[1].step(0)


def test_reconstruction_has_no_gradient_to_its_target(llama: Path) -> None:
    """The embedding learns through the block's output only: as if the target were a constant."""
    stage = make_stage(llama, FIRST)
    [batch] = microbatches(batch_size=4)
    output = stage.forward(batch, None)
    assert not output.inputs.requires_grad
    assert torch.equal(output.inputs, stage.block.model.get_input_embeddings()(batch.input_ids))
    constant = dataclasses.replace(output, inputs=output.inputs.clone())
    stage.loss(output, batch, batch.num_tokens).backward(retain_graph=True)
    actual = gradients(stage)
    optimizer_of(stage).inner.zero_grad()
    stage.loss(constant, batch, batch.num_tokens).backward()
    assert equal(actual, gradients(stage))
    assert actual["model.model.embed_tokens.weight"].any()


def test_hidden_states_leave_detached(llama: Path) -> None:
    stage = make_stage(llama, FIRST)
    [batch] = microbatches(batch_size=4)
    output = stage.forward(batch, None)
    outgoing = stage.outgoing(output)
    assert output.hidden_states.requires_grad
    assert not outgoing.requires_grad and outgoing.grad_fn is None and outgoing.is_contiguous()
    assert torch.equal(outgoing, output.hidden_states)
    assert outgoing.dtype == torch.float32


def test_a_microbatch_without_a_target_contributes_nothing(llama: Path) -> None:
    alone, joined = make_stage(llama, LAST), make_stage(llama, LAST)
    with_targets = microbatches([(12, 9), (5, 1)])
    without = microbatches([(12, 9), (5, 1), (7, 0), (6, 0)])[1]
    assert without.num_targets == 0
    accumulate(alone, with_targets)
    accumulate(joined, [*with_targets, without])
    assert equal(gradients(alone), gradients(joined))
    assert alone.step(0) == joined.step(0)
    assert equal(values(alone), values(joined))


def test_a_step_without_any_target(llama: Path) -> None:
    stage = make_stage(llama, LAST)
    before = values(stage)
    accumulate(stage, microbatches([(7, 0), (6, 0), (3, 0), (2, 0)]))
    assert stage.step(0) == {"loss": 0.0, "grad_norm": 0.0, "learning_rate": 1e-2}
    assert equal(values(stage), before)


@pytest.mark.parametrize("spec", [FIRST, LAST], ids=["first", "last"])
def test_a_step_reports_and_learns(llama: Path, spec: BlockSpec) -> None:
    stage = make_stage(llama, spec, max_grad_norm=0.0)
    before = values(stage)
    losses = []
    for step in range(8):
        accumulate(stage, microbatches(step=step))
        grads = torch.cat([grad.flatten() for grad in gradients(stage).values()])
        record = stage.step(step)
        assert record.keys() == {objective_of(stage).name, "grad_norm", "learning_rate"}
        assert record["grad_norm"] == pytest.approx(grads.norm().item(), rel=1e-5)
        assert all(parameter.grad is None for parameter in parameters(stage).values())
        assert record["learning_rate"] == pytest.approx((1 - step / 10) * (1e-2 if spec.is_last else 1e-3))
        losses.append(record[objective_of(stage).name])
    assert stage.steps_done == 8
    assert losses[-1] < 0.9 * losses[0]
    assert not any(torch.equal(values(stage)[name], before[name]) for name in before)


def test_a_loss_that_is_not_finite_changes_nothing(llama: Path) -> None:
    stage = make_stage(llama, LAST)
    accumulate(stage, microbatches())
    stage.step(0)
    before, state = values(stage), optimizer_of(stage).inner.state_dict()["state"]
    moments = {key: entry["exp_avg"].clone() for key, entry in state.items()}

    def broken(stage: Stage, batch: Microbatch) -> torch.Tensor | None:
        hidden_states = received(stage, batch)
        assert hidden_states is not None
        return hidden_states * float("nan") if batch.index == 1 else hidden_states

    accumulate(stage, microbatches(step=1), broken)
    with pytest.raises(NotFiniteError, match=r"^stage 1: the loss of step 2, microbatch 2 is nan; "):
        stage.step(1)
    assert stage.steps_done == 1
    assert equal(values(stage), before)
    state = optimizer_of(stage).inner.state_dict()["state"]
    assert all(torch.equal(state[key]["exp_avg"], moments[key]) for key in moments)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(llama: Path, max_grad_norm: float) -> None:
    stage = make_stage(llama, FIRST, max_grad_norm=max_grad_norm)
    before = values(stage)
    accumulate(stage, microbatches())
    grad = next(stage.block.parameters()).grad
    assert grad is not None
    grad[0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"^stage 0: the gradient norm of step 5 is inf; "):
        stage.step(4)
    assert stage.steps_done == 0
    assert equal(values(stage), before)


def test_dropout_is_a_function_of_seed_stage_step_and_microbatch(gpt2: Path) -> None:
    batch, other = microbatches([(6, 1)] * 4)
    same_tokens = dataclasses.replace(other, input_ids=batch.input_ids)
    middle = BlockSpec(1, 4, 1, 2)
    hidden_states = torch.randn(2, 6, HIDDEN)

    def output(batch: Microbatch, seed: int = 0, spec: BlockSpec = middle) -> torch.Tensor:
        torch.manual_seed(torch.seed())  # Whatever else has drawn.
        return make_stage(gpt2, spec, seed=seed).forward(batch, hidden_states).hidden_states

    first = output(batch)
    assert torch.equal(output(batch), first)
    assert not torch.equal(output(batch, seed=1), first)
    assert not torch.equal(output(dataclasses.replace(batch, step=1)), first)
    assert not torch.equal(output(same_tokens), first)
    assert not torch.equal(output(batch, spec=BlockSpec(2, 4, 1, 2)), first), "the same layer at another stage"


@pytest.mark.parametrize("spec", [FIRST, LAST], ids=["first", "last"])
def test_bfloat16_keeps_weights_gradients_and_optimizer_in_float32(llama: Path, spec: BlockSpec) -> None:
    stage = make_stage(llama, spec, "bfloat16")
    exact = make_stage(llama, spec)

    def rounded(stage: Stage, batch: Microbatch) -> torch.Tensor | None:
        hidden_states = received(stage, batch)
        return None if hidden_states is None else hidden_states.bfloat16()

    accumulate(stage, microbatches(), rounded)
    accumulate(exact, microbatches(), rounded)
    assert {grad.dtype for grad in gradients(stage).values()} == {torch.float32}
    assert not equal(gradients(stage), gradients(exact)), "bfloat16 has changed nothing"
    record, exact_record = stage.step(0), exact.step(0)
    assert record[objective_of(stage).name] == pytest.approx(exact_record[objective_of(stage).name], rel=0.02)
    assert {parameter.dtype for parameter in parameters(stage).values()} == {torch.float32}
    state = [tensor for entry in optimizer_of(stage).inner.state.values() for tensor in entry.values()]
    assert len(state) == 3 * len(parameters(stage))
    assert {tensor.dtype for tensor in state} == {torch.float32}


def test_bfloat16_hidden_states_are_rounded_only_where_they_cross(llama: Path) -> None:
    [batch] = microbatches(batch_size=4)
    first, last = (make_stage(llama, spec, "bfloat16") for spec in (FIRST, LAST))
    output = first.forward(batch, None)
    outgoing = first.outgoing(output)
    assert output.hidden_states.dtype == output.inputs.dtype == torch.float32
    assert outgoing.dtype == torch.bfloat16 and not outgoing.requires_grad
    assert torch.equal(outgoing, output.hidden_states.bfloat16())
    entered = last.forward(batch, outgoing)
    assert entered.inputs.dtype == entered.hidden_states.dtype == torch.float32
    assert torch.equal(entered.inputs, outgoing.float())
    assert last.loss(entered, batch, batch.num_targets).dtype == torch.float32

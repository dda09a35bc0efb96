"""One stage by itself: its losses, its step, its randomness and its dtypes."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import write_model
from torch import nn
from transformers import AutoConfig

from lopt_pp.computation import StageConfig
from lopt_pp.data import DataOrder, Microbatch, TokenizedRows
from lopt_pp.errors import LoptError
from lopt_pp.objectives import NextToken, ObjectiveConfig, Reconstruction
from lopt_pp.optim import OptimConfig
from lopt_pp.split import BlockModel, Span, split_evenly
from lopt_pp.stage import NotFiniteError, Stage, local_objective
from lopt_pp.verify import check_split, model_class_of
from lopt_pp.weights import Checkpoint, load_block

HIDDEN = 64

# Rows as (number of tokens, number of target tokens, at the end).
UNEVEN = [(12, 9), (5, 1), (3, 1), (2, 1)]
"""Two microbatches of two rows, with 10 and 2 target tokens."""

FIRST, LAST = split_evenly(4, 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpt2"), "gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)


def make_block(model: Path, span: Span) -> BlockModel:
    config = AutoConfig.from_pretrained(model)
    model_class = model_class_of(config)
    anatomy = check_split(model_class, config, split_evenly(4, 2))
    return load_block(Checkpoint(str(model)), model_class, config, anatomy, span)


def make_stage(model: Path, span: Span, dtype: str = "float32", seed: int = 0, **optim: float) -> Stage:
    block = make_block(model, span)
    objective = local_objective(block, ObjectiveConfig(), seed)
    config = StageConfig(dtype=dtype)  # type: ignore[arg-type]
    return Stage(block, objective, OptimConfig(learning_rate=1e-2, **optim), 10, config=config, seed=seed)  # type: ignore[arg-type]


def microbatches(rows: Sequence[tuple[int, int]] = UNEVEN, batch_size: int = 2, step: int = 0) -> list[Microbatch]:
    """The microbatches of a step over all rows; their token ids are the same for every batch size."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 40, (tokens,), generator=draw).tolist() for tokens, _ in rows]
    labels = [
        [-100] * (len(row) - targets) + row[len(row) - targets :] for row, (_, targets) in zip(ids, rows, strict=True)
    ]
    lengths, num_targets = zip(*rows, strict=True)
    columns = {"input_ids": ids, "labels": labels, "length": lengths, "num_targets": num_targets}
    order = DataOrder(
        TokenizedRows(Dataset.from_dict(columns), "a test", {}),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=len(rows) // batch_size,
        shuffle=False,
        seed=0,
        pad_token_id=0,
        sampling="random",
    )
    return order.microbatches(step)


def received(stage: Stage, batch: Microbatch) -> torch.Tensor | None:
    """What the stage before sends: here a function of the token ids and places alone."""
    if stage.block.span.is_first:
        return None
    table = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1))
    places = torch.randn(batch.input_ids.shape[1], HIDDEN, generator=torch.Generator().manual_seed(2))
    return table[batch.input_ids] + places


def accumulate(
    stage: Stage,
    batches: Sequence[Microbatch],
    receive: Callable[[Stage, Microbatch], torch.Tensor | None] = received,
) -> None:
    """Everything of a step but the optimizer's part, as the training loop does it."""
    count = sum(map(stage.objective.count, batches))
    for batch in batches:
        output = stage.forward(batch, receive(stage, batch))
        stage.loss(output, batch, count).backward()


def parameters(stage: Stage) -> dict[str, nn.Parameter]:
    named = dict(stage.block.named_parameters())
    if isinstance(stage.objective, Reconstruction):
        named |= {f"head.{name}": parameter for name, parameter in stage.objective.named_parameters()}
    return named


def gradients(stage: Stage) -> dict[str, torch.Tensor]:
    """The gradient of each parameter; none is left out."""
    found = {name: parameter.grad for name, parameter in parameters(stage).items()}
    assert found
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def values(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters(stage).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_last_block_learns_the_task_and_the_others_reconstruct(llama: Path) -> None:
    for span in split_evenly(4, 3):
        objective = local_objective(make_block(llama, span), ObjectiveConfig(reconstruction_weight=7.0), seed=0)
        assert isinstance(objective, NextToken if span.is_last else Reconstruction)
        assert objective.weight == (1.0 if span.is_last else 7.0)


def test_heads_are_drawn_by_seed_and_stage(llama: Path) -> None:
    def head(seed: int, stage: int) -> torch.Tensor:
        objective = local_objective(make_block(llama, split_evenly(4, 3)[stage]), ObjectiveConfig(), seed)
        assert isinstance(objective, Reconstruction)
        return nn.utils.parameters_to_vector(objective.parameters())

    assert torch.equal(head(3, 0), head(3, 0))
    assert not torch.equal(head(3, 0), head(4, 0))
    assert not torch.equal(head(3, 0), head(3, 1))


@pytest.mark.parametrize("span", [FIRST, LAST], ids=["first", "last"])
def test_losses_are_means_over_the_tokens_of_the_whole_step(llama: Path, span: Span) -> None:
    """However the step is cut into microbatches, and not the mean of their means."""
    cut, whole = make_stage(llama, span), make_stage(llama, span)
    batches, batch = microbatches(batch_size=2), microbatches(batch_size=4)
    accumulate(cut, batches)
    accumulate(whole, batch)
    torch.testing.assert_close(gradients(cut), gradients(whole), rtol=1e-4, atol=1e-7)
    name = cut.objective.name
    loss = cut.step(0)[name]
    assert loss == pytest.approx(whole.step(0)[name], rel=1e-5)

    means = []
    for part in batches:
        accumulate(cut := make_stage(llama, span), [part])
        means.append(cut.step(0)[name])
    counts = [cut.objective.count(part) for part in batches]
    assert loss == pytest.approx(sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts), rel=1e-5)
    assert loss != pytest.approx(sum(means) / 2, rel=1e-3), "the test could not tell a mean of means"


def test_the_weight_multiplies_the_gradient_but_not_the_report(llama: Path) -> None:
    stages = [make_stage(llama, FIRST) for _ in range(2)]
    stages[1].objective.weight = 40.0
    for stage in stages:
        accumulate(stage, microbatches())
    once, four_times = (gradients(stage) for stage in stages)
    torch.testing.assert_close({name: grad * 4 for name, grad in once.items()}, four_times)
    first, second = (stage.step(0) for stage in stages)
    assert first["reconstruction_loss"] == second["reconstruction_loss"]
    assert second["grad_norm"] == pytest.approx(4 * first["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("span", [FIRST, LAST], ids=["first", "last"])
def test_padding_changes_nothing(llama: Path, span: Span) -> None:
    batches = microbatches()
    other_ids = [dataclasses.replace(b, input_ids=b.input_ids.where(b.token_mask, 17)) for b in batches]
    assert not torch.equal(other_ids[0].input_ids, batches[0].input_ids)
    stages = [make_stage(llama, span) for _ in range(2)]
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
    stage.optimizer.adamw.zero_grad()
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


@pytest.mark.parametrize("span", [FIRST, LAST], ids=["first", "last"])
def test_a_step_reports_and_learns(llama: Path, span: Span) -> None:
    stage = make_stage(llama, span, max_grad_norm=0.0)
    before = values(stage)
    losses = []
    for step in range(8):
        accumulate(stage, microbatches(step=step))
        grads = torch.cat([grad.flatten() for grad in gradients(stage).values()])
        record = stage.step(step)
        assert record.keys() == {stage.objective.name, "grad_norm", "learning_rate"}
        assert record["grad_norm"] == pytest.approx(grads.norm().item(), rel=1e-5)
        assert all(parameter.grad is None for parameter in parameters(stage).values())
        assert record["learning_rate"] == pytest.approx((1 - step / 10) * (1e-2 if span.is_last else 1e-3))
        losses.append(record[stage.objective.name])
    assert stage.steps_done == 8
    assert losses[-1] < 0.9 * losses[0]
    assert not any(torch.equal(values(stage)[name], before[name]) for name in before)


def test_a_loss_that_is_not_finite_changes_nothing(llama: Path) -> None:
    stage = make_stage(llama, LAST)
    accumulate(stage, microbatches())
    stage.step(0)
    before, state = values(stage), stage.optimizer.adamw.state_dict()["state"]
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
    state = stage.optimizer.adamw.state_dict()["state"]
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
    middle = Span(1, 4, 1, 2)
    hidden_states = torch.randn(2, 6, HIDDEN)

    def output(batch: Microbatch, seed: int = 0, span: Span = middle) -> torch.Tensor:
        torch.manual_seed(torch.seed())  # Whatever else has drawn.
        return make_stage(gpt2, span, seed=seed).forward(batch, hidden_states).hidden_states

    first = output(batch)
    assert torch.equal(output(batch), first)
    assert not torch.equal(output(batch, seed=1), first)
    assert not torch.equal(output(dataclasses.replace(batch, step=1)), first)
    assert not torch.equal(output(same_tokens), first)
    assert not torch.equal(output(batch, span=Span(2, 4, 1, 2)), first), "the same layer at another stage"


@pytest.mark.parametrize("span", [FIRST, LAST], ids=["first", "last"])
def test_bfloat16_keeps_weights_gradients_and_optimizer_in_float32(llama: Path, span: Span) -> None:
    stage = make_stage(llama, span, "bfloat16")
    exact = make_stage(llama, span)

    def rounded(stage: Stage, batch: Microbatch) -> torch.Tensor | None:
        hidden_states = received(stage, batch)
        return None if hidden_states is None else hidden_states.bfloat16()

    accumulate(stage, microbatches(), rounded)
    accumulate(exact, microbatches(), rounded)
    assert {grad.dtype for grad in gradients(stage).values()} == {torch.float32}
    assert not equal(gradients(stage), gradients(exact)), "bfloat16 has changed nothing"
    record, exact_record = stage.step(0), exact.step(0)
    assert record[stage.objective.name] == pytest.approx(exact_record[stage.objective.name], rel=0.02)
    assert {parameter.dtype for parameter in parameters(stage).values()} == {torch.float32}
    state = [tensor for entry in stage.optimizer.adamw.state.values() for tensor in entry.values()]
    assert len(state) == 3 * len(parameters(stage))
    assert {tensor.dtype for tensor in state} == {torch.float32}


def make_warming_stage(
    model: Path,
    objective: ObjectiveConfig,
    steps: int = 2,
    local_accumulation_steps: int | None = None,
    **optim: float,
) -> Stage:
    block = make_block(model, FIRST)
    if not objective.train_embeddings:
        block.hold_embeddings()
    config = AutoConfig.from_pretrained(model)
    model_class = model_class_of(config)
    anatomy = check_split(model_class, config, split_evenly(4, 2))
    own = local_objective(
        block, objective, 0, lambda span: load_block(Checkpoint(str(model)), model_class, config, anatomy, span)
    )
    optim = {"learning_rate": 1e-2, "weight_decay": 0.1} | optim
    warmup = {"local_head_warmup_steps": steps, "local_accumulation_steps": local_accumulation_steps}
    return Stage(block, own, OptimConfig(**optim), 10, **warmup)  # type: ignore[arg-type]


OBJECTIVES = {
    "reconstruction": ObjectiveConfig(),
    "next token": ObjectiveConfig(local_objective="next_token"),
    "own": ObjectiveConfig(local_objective="own_objective:TokenItself"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_block_stands_while_its_head_warms_up(llama: Path, name: str) -> None:
    """To the bit, weight decay and moments included; then it learns at the rate of the schedule."""
    stage = make_warming_stage(llama, OBJECTIVES[name], steps=2)
    block, head = dict(stage.block.named_parameters()), dict(stage.objective.named_parameters())
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
        stands = [torch.equal(parameter, before[name]) for name, parameter in block.items()]
        assert all(stands) if step < 2 else not any(stands)
    share = stage.objective.rate_share
    assert rates == pytest.approx([0, 0, 1e-2 * share * 8 / 10, 1e-2 * share * 7 / 10])
    assert {float(stage.optimizer.state_of(parameter)["step"]) for parameter in block.values()} == {2.0}


def test_a_head_warms_up_at_a_rate_of_its_own(llama: Path) -> None:
    """The first step of Adam moves each number by the rate, or nothing."""
    rate = 3e-3
    stage = make_warming_stage(llama, ObjectiveConfig(), local_head_learning_rate=rate, weight_decay=0.0)
    start = {name: parameter.detach().clone() for name, parameter in stage.objective.named_parameters()}
    accumulate(stage, microbatches())
    stage.step(0)
    for name, parameter in stage.objective.named_parameters():
        assert (parameter - start[name]).abs().max().item() == pytest.approx(rate, rel=1e-2)


def test_an_objective_without_a_head_has_nothing_to_warm_up(llama: Path) -> None:
    stage = make_warming_stage(llama, ObjectiveConfig(local_objective="own_objective:Small"))
    assert stage.block_learns
    accumulate(stage, microbatches())
    assert stage.step(0)["size_loss"] > 0


@pytest.mark.parametrize(("learned", "num_turns"), [(1, 2), (2, 3), (3, 3), (2, 5), (4, 2)])
def test_each_microbatch_has_its_turn(llama: Path, learned: int, num_turns: int) -> None:
    stage = make_warming_stage(llama, ObjectiveConfig(), local_accumulation_steps=learned)
    number = min(learned, num_turns)
    turns = [stage.learned_turns(step, num_turns) for step in range(num_turns)]
    assert all(len(set(own)) == number and own == sorted(own) for own in turns)
    for turn in range(num_turns):
        assert sum(turn in own for own in turns) == number
    assert stage.learned_share(num_turns) == number / num_turns
    last = make_stage(llama, LAST)
    assert last.learned_turns(7, num_turns) == [*range(num_turns)] and last.learned_share(num_turns) == 1


def test_what_is_not_learned_from_goes_forward_alike(llama: Path) -> None:
    stage = make_warming_stage(llama, ObjectiveConfig(), steps=0)
    (batch,) = microbatches()[:1]
    output, plain = stage.forward(batch, None), stage.forward(batch, None, learns=False)
    assert torch.equal(output.hidden_states, plain.hidden_states)
    assert output.hidden_states.requires_grad and not plain.hidden_states.requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_embeddings_may_stand(llama: Path, name: str) -> None:
    stage = make_warming_stage(llama, dataclasses.replace(OBJECTIVES[name], train_embeddings=False), steps=0)
    embedding = stage.block.model.get_input_embeddings().weight
    before = values(stage)
    accumulate(stage, microbatches())
    stage.step(0)
    after = values(stage)
    assert [name for name in before if torch.equal(before[name], after[name])] == ["model.model.embed_tokens.weight"]
    assert embedding.grad is None and not stage.optimizer.state_of(embedding)


def test_standing_ends_the_learning(llama: Path) -> None:
    """Between two steps; what the block gives from then on is what it gave, and it can be saved and gone on from."""
    stage = make_warming_stage(llama, ObjectiveConfig(), steps=0)
    accumulate(stage, microbatches())
    stage.step(0)
    before = values(stage)
    stage.stand()
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


@pytest.mark.parametrize("done", [1, 3])
def test_a_stage_goes_on_from_its_state(llama: Path, done: int) -> None:
    """Within the warm-up, where the block has no moments yet, and after it. Standing copies are not in it."""
    config = ObjectiveConfig(local_objective="next_token", train_embeddings=False)

    def train(stage: Stage, steps: range) -> dict[str, torch.Tensor]:
        for step in steps:
            accumulate(stage, microbatches(step=step))
            stage.step(step)
        return stage.state()

    stage = make_warming_stage(llama, config)
    state = train(stage, range(done))
    assert "objective.network.model.lm_head.weight" not in state
    assert "block.model.embed_tokens.weight" in state and "exp_avg.block.model.embed_tokens.weight" not in state
    assert ("exp_avg.block.model.layers.0.mlp.up_proj.weight" in state) == (done == 3)
    expected = train(stage, range(done, 5))
    again = make_warming_stage(llama, config)
    again.resume(state, done)
    assert equal(train(again, range(done, 5)), expected)
    del state["step.objective.network.model.model.norm.weight"]
    with pytest.raises(LoptError, match="has no tensor step.objective.network.model.model.norm.weight"):
        make_warming_stage(llama, config).resume(state, done)


def test_bfloat16_hidden_states_are_rounded_only_where_they_cross(llama: Path) -> None:
    [batch] = microbatches(batch_size=4)
    first, last = (make_stage(llama, span, "bfloat16") for span in (FIRST, LAST))
    output = first.forward(batch, None)
    outgoing = first.outgoing(output)
    assert output.hidden_states.dtype == output.inputs.dtype == torch.float32
    assert outgoing.dtype == torch.bfloat16 and not outgoing.requires_grad
    assert torch.equal(outgoing, output.hidden_states.bfloat16())
    entered = last.forward(batch, outgoing)
    assert entered.inputs.dtype == entered.hidden_states.dtype == torch.float32
    assert torch.equal(entered.inputs, outgoing.float())
    assert last.loss(entered, batch, batch.num_targets).dtype == torch.float32

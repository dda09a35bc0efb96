"""The auxiliary network is the rest of the model with layers left out; and what of it learns."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import weight_of
from families import FAMILIES, leave_out, tiny_config
from microbatch import VOCABULARY, make_batch
from small_stages import counts_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from lopt_pp.errors import LoptError
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec, split_at, split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_sample, check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import AuxiliaryNextToken, NextToken, ObjectiveConfig, Site
from lopt_pp.planning.synthetic import random_microbatch
from lopt_pp.stage.compute import checkpoint_layers

Load = Callable[[BlockSpec], BlockModel]


def write_model(path: Path, family: str, **changes: Any) -> PreTrainedModel:
    """A whole model with random weights, none of them at its initial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path)
    return model


def loader(path: Path, whole: PreTrainedModel, specs: Sequence[BlockSpec]) -> Load:
    """Makes blocks as the trainer does."""
    config, checkpoint = type(whole.config).from_pretrained(path), PretrainedWeights(str(path))
    model_class = model_class_of(config)
    structure = check_split(model_class, config, specs)

    def load(spec: BlockSpec) -> BlockModel:
        if spec.start == config.num_hidden_layers // 2:
            check_sample(model_class, config, structure, spec)
        return BlockBuilder(model_class, config, structure).from_pretrained(spec, checkpoint)

    return load


def make_objective(block: BlockModel, load: Load, layers: int = 2) -> AuxiliaryNextToken:
    return AuxiliaryNextToken(
        Site(block, ObjectiveConfig(local_objective="next_token", auxiliary_layers=layers), torch.Generator(), load)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_rest_of_the_model_without_some_layers(family: str, tmp_path: Path) -> None:
    """At every boundary, bit for bit: positions, masks, scales and caps of the family are in their places."""
    write_model(tmp_path, family)
    depth = tiny_config(family).num_hidden_layers
    input_ids = torch.randint(3, 128, (2, 11))
    load = loader(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path), split_evenly(depth, 2))
    for boundary in range(1, depth):
        whole = AutoModelForCausalLM.from_pretrained(tmp_path)
        block = load(BlockSpec(0, 2, 0, boundary)).eval()
        network = make_objective(block, load).network.eval()
        kept = network.spec.layers
        assert len(kept) == min(2, depth - boundary) and kept[-1] == depth - 1 and kept[0] >= boundary
        leave_out(whole, block._structure.layers, [n for n in range(boundary, depth) if n not in kept])
        with torch.no_grad():
            expected = whole(input_ids=input_ids, use_cache=False).logits
            logits = network(hidden_states=block(input_ids).hidden_states).logits
        assert torch.equal(logits, expected), f"{family} cut at {boundary}"


@pytest.mark.parametrize(
    ("stop", "depth", "number", "layers"),
    [
        (15, 30, 2, (22, 29)),
        (15, 30, 1, (29,)),
        (15, 30, 3, (19, 24, 29)),
        (2, 4, 2, (2, 3)),
        (3, 4, 2, (3,)),
        (1, 8, 99, (1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_layers_at_even_distances(stop: int, depth: int, number: int, layers: tuple[int, ...]) -> None:
    sample = BlockSpec(0, 2, 0, stop).sample_after(depth, number)
    assert sample.layers == layers and sample.is_last and not sample.is_first
    assert str(sample) == f"layers {', '.join(map(str, layers))}"


def test_layers_that_the_user_names() -> None:
    """Of one list each block takes those that follow it."""
    numbers = (2, 5, 7)
    assert BlockSpec(0, 3, 0, 2).choose_after(8, numbers).layers == (2, 5, 7)
    later = BlockSpec(1, 3, 2, 5).choose_after(8, numbers)
    assert later.layers == (5, 7) and later.is_last and not later.is_first
    with pytest.raises(LoptError, match="^the layers 1 .* after layers 0-1: at least one of the layers 2 to 7, "):
        BlockSpec(0, 2, 0, 2).choose_after(8, (1,))
    with pytest.raises(LoptError, match="^the layers 3,8 .* and none above$"):
        BlockSpec(0, 2, 0, 2).choose_after(8, (3, 8))


def test_of_all_layers_the_gradient_is_that_of_end_to_end_training(tmp_path: Path) -> None:
    """Of the whole model of transformers, whose output head is of its own."""
    whole = write_model(tmp_path, "llama", tie_word_embeddings=False)
    load = loader(tmp_path, whole, split_evenly(4, 2))
    block = load(BlockSpec(0, 2, 0, 2))
    config = ObjectiveConfig(local_objective="next_token", auxiliary_choice="all", auxiliary_layers=1)
    objective = AuxiliaryNextToken(Site(block, config, torch.Generator(), load))
    assert objective.network.spec.layers == (2, 3)
    batch = random_microbatch((2, 12), 128, torch.device("cpu"))
    loss = objective(block(batch.input_ids), batch)
    loss.backward()
    logits = whole(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    own = dict(block.model.named_parameters()) | {
        name: parameter for name, parameter in objective.network.model.named_parameters() if parameter.requires_grad
    }
    assert own.keys() == gradients.keys() - {"lm_head.weight"}
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=partial("{}: {}".format, name))


def test_the_network_has_the_named_layers(tmp_path: Path) -> None:
    whole = write_model(tmp_path, "llama")
    load = loader(tmp_path, whole, split_at([1], 4))
    block = load(BlockSpec(0, 2, 0, 1))

    def make(choice: str) -> AuxiliaryNextToken:
        config = ObjectiveConfig(local_objective="next_token", auxiliary_choice=choice)
        return AuxiliaryNextToken(Site(block, config, torch.Generator(), load))

    assert make("1,3").network.spec.layers == (1, 3)
    even, named = make("even"), make("2,3")
    assert even.network.spec == named.network.spec
    with pytest.raises(LoptError, match="^--auxiliary_choice 2,4 are not those of an auxiliary network after layers 0"):
        make("2,4")


@pytest.fixture(params=["llama", "gemma2"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[BlockModel, AuxiliaryNextToken]:
    """The block and the objective of the first of two stages; one family has a plain output head."""
    whole = write_model(tmp_path, request.param)
    specs = split_at([2], whole.config.num_hidden_layers)
    load = loader(tmp_path, whole, specs)
    block = load(specs[0])
    return block, make_objective(block, load)


def test_the_loss_is_that_of_the_task_on_what_the_network_gives(
    trained: tuple[BlockModel, AuxiliaryNextToken],
) -> None:
    block, objective = trained
    batch = make_batch()
    assert objective.count(counts_of(batch)) == batch.num_targets
    output = block(batch.input_ids)
    loss = objective(output, batch)
    logits = objective.network(hidden_states=output.hidden_states).logits[:, batch.target_positions]
    assert logits.shape[-1] > VOCABULARY
    expected = NextToken()(BlockOutput(output.inputs, output.hidden_states, logits), batch)
    torch.testing.assert_close(loss, expected)
    of = [output.hidden_states, *block.parameters(), *(p for p in objective.parameters() if p.requires_grad)]
    first = torch.autograd.grad(loss, of, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(expected, of), rtol=1e-3, atol=1e-5)
    assert all(gradient.any() for gradient in first)


def test_the_output_head_is_frozen_and_the_rest_learns(trained: tuple[BlockModel, AuxiliaryNextToken]) -> None:
    _, objective = trained
    frozen = [name for name, parameter in objective.named_parameters() if not parameter.requires_grad]
    assert frozen == ["network.model.lm_head.weight"]
    names = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    assert any(".norm." in name for name in names) and any(".layers.3." in name for name in names)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_frozen_embedding_is_kept_once_where_it_is_tied(tmp_path: Path, tied: bool, is_frozen: bool) -> None:
    whole = write_model(tmp_path, "llama", tie_word_embeddings=tied)
    load = loader(tmp_path, whole, split_at([2], 4))
    block = load(BlockSpec(0, 2, 0, 2))
    if is_frozen:
        block.freeze_embeddings()
    embedding = weight_of(block.model.get_input_embeddings())
    assert embedding.requires_grad != is_frozen
    head = weight_of(make_objective(block, load).network.model.get_output_embeddings())
    assert (head is embedding) == (tied and is_frozen)
    assert torch.equal(head, embedding) == tied and not head.requires_grad


def test_checkpointing_its_layers_changes_no_gradient(trained: tuple[BlockModel, AuxiliaryNextToken]) -> None:

    block, objective = trained
    batch = random_microbatch((2, 9), 40, torch.device("cpu"))
    received = block(batch.input_ids).hidden_states.detach().requires_grad_()
    of = [received, *(p for p in objective.parameters() if p.requires_grad)]
    objective.train()

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(objective(BlockOutput(received.detach(), received, None), batch), of)

    plain = gradients()
    checkpoint_layers(objective.network.model)
    assert all(torch.equal(first, second) for first, second in zip(plain, gradients(), strict=True))

"""Every family, cut at every boundary: the chained blocks give the whole model's logits, bit for bit."""

import itertools
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_at, split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.stage.compute import checkpoint_layers


def random_model(family: str, **changes: object) -> PreTrainedModel:
    """A whole model with random weights, none of them at its initial value."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_chained_blocks_equal_the_whole_model(family: str, tmp_path: Path) -> None:
    whole = random_model(family)
    whole.save_pretrained(tmp_path)
    config = type(whole.config).from_pretrained(tmp_path)
    depth = config.num_hidden_layers
    model_class = model_class_of(config)
    checkpoint = PretrainedWeights(str(tmp_path))
    input_ids = torch.randint(3, 128, (2, 11))
    with torch.no_grad():
        expected = whole(input_ids=input_ids, use_cache=False).logits
        cuts = [[boundary] for boundary in range(1, depth)] + [list(range(1, depth))]
        for boundaries in cuts:
            specs = split_at(boundaries, depth)
            structure = check_split(model_class, config, specs)
            blocks = [
                BlockBuilder(model_class, config, structure).from_pretrained(spec, checkpoint).eval() for spec in specs
            ]
            output = blocks[0](input_ids)
            for block in blocks[1:]:
                output = block(hidden_states=output.hidden_states)
            assert torch.equal(output.logits, expected), f"{family} cut at {boundaries}"


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family: str) -> None:
    """Of a later block: backward runs the first layer again, on what was received."""
    whole = random_model(family, tie_word_embeddings=False)
    config, model_class = whole.config, type(whole)
    specs = split_evenly(config.num_hidden_layers, 2)
    structure = check_split(model_class, config, specs)
    state = {name: tensor for name, tensor in whole.state_dict().items() if structure.owns(specs[1], name)}
    received = torch.randn(2, 9, 64, requires_grad=True)

    def gradients(checkpoints: bool) -> list[torch.Tensor]:
        block = BlockBuilder(model_class, config, structure).from_state_dict(specs[1], state, "a test").train()
        if checkpoints:
            checkpoint_layers(block.model)
        torch.manual_seed(0)  # Of dropout.
        loss = block(hidden_states=received).logits.pow(2).sum()
        return list(torch.autograd.grad(loss, [received, *block.parameters()]))

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(first, second) for first, second in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_every_parameter_has_one_owner_and_its_own_name(family: str, tmp_path: Path) -> None:
    whole = random_model(family, tie_word_embeddings=False)
    whole.save_pretrained(tmp_path)
    config = whole.config
    specs = split_evenly(config.num_hidden_layers, 3)
    builder = BlockBuilder(type(whole), config, check_split(model_class_of(config), config, specs))
    checkpoint = PretrainedWeights(str(tmp_path))
    owned = [dict(builder.from_pretrained(spec, checkpoint).model.named_parameters()) for spec in specs]
    names = list(itertools.chain.from_iterable(owned))
    assert sorted(names) == sorted(name for name, _ in whole.named_parameters())
    joined = {name: parameter for block in owned for name, parameter in block.items()}
    assert all(torch.equal(joined[name], parameter) for name, parameter in whole.named_parameters())

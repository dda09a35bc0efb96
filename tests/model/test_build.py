"""Blocks on the meta device and with random weights are those that are loaded; and all are built in one place."""

import ast
from pathlib import Path

import pytest
import torch
from families import tiny_config

import lopt_pp
from lopt_pp.errors import LoptError
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split

PACKAGE = Path(lopt_pp.__file__).parent


def make_builder(family: str) -> BlockBuilder:
    config = tiny_config(family, tie_word_embeddings=True)
    model_class = model_class_of(config)
    return BlockBuilder(
        model_class, config, check_split(model_class, config, split_evenly(config.num_hidden_layers, 2))
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_block_is_the_same_however_it_gets_its_weights(family: str) -> None:
    builder = make_builder(family)
    for spec in split_evenly(builder.config.num_hidden_layers, 2):
        planned, measured = builder.on_meta(spec), builder.with_random_weights(spec)
        assert all(parameter.is_meta for parameter in planned.parameters())
        state = measured.model.state_dict()
        loaded = builder.from_state_dict(spec, state, "a test")
        for block in (planned, loaded):
            found = {name: (tensor.shape, tensor.dtype) for name, tensor in block.model.state_dict().items()}
            assert found == {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
        # The model ties them; here another block may train the embedding.
        assert (builder.structure.head in state) == spec.is_last
        assert (builder.structure.embedding in state) == spec.is_first
    assert builder.config.tie_word_embeddings, "the model's config is not the builder's to change"


def test_tensors_that_are_missing_are_named_with_their_source() -> None:
    builder = make_builder("llama")
    first, _ = split_evenly(4, 2)
    state = builder.with_random_weights(first).model.state_dict()
    del state["model.embed_tokens.weight"]
    with pytest.raises(LoptError, match="^a test: tensors of stage 0 are missing .*: model.embed_tokens.weight$"):
        builder.from_state_dict(first, state, "a test")


def test_every_block_is_built_in_one_place() -> None:
    """So that what is to be done to each block of a run can be done there."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("block_class", "BlockModel"):
                found.add(file.relative_to(PACKAGE).as_posix())
    assert found == {"model/build.py"}

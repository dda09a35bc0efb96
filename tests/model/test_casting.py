"""A model in bfloat16 is what `transformers` makes of it in bfloat16: its buffers are not rounded."""

import copy

import pytest
import torch
from families import FAMILIES, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lopt_pp.config.compute import StageConfig
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.dtypes import cast_parameters
from lopt_pp.model.partition import split_at
from lopt_pp.model.verify import check_split
from lopt_pp.stage.compute import prepare_block

B16 = torch.bfloat16


def as_transformers_loads_it(config_of: PreTrainedModel) -> PreTrainedModel:
    """The same weights in bfloat16, loaded by `transformers`."""
    state = {name: tensor.clone() for name, tensor in config_of.state_dict().items()}
    config = copy.deepcopy(config_of.config)
    return type(config_of).from_pretrained(None, config=config, state_dict=state, dtype=B16).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_in_bfloat16_is_what_transformers_loads(family: str) -> None:
    torch.manual_seed(0)
    # Long rows: at position 1,000 a rounded rotary frequency is wrong by more than a radian.
    more = {"n_positions": 1024} if family == "gpt2" else {"max_position_embeddings": 1024}
    whole = AutoModelForCausalLM.from_config(tiny_config(family, tie_word_embeddings=False, **more)).eval()
    specs = split_at([], whole.config.num_hidden_layers)
    builder = BlockBuilder(type(whole), whole.config, check_split(type(whole), whole.config, specs))
    block = builder.from_state_dict(specs[0], whole.state_dict(), family)
    prepare_block(block, StageConfig(dtype="pure_bfloat16"), torch.device("cpu")).eval()
    expected = as_transformers_loads_it(whole)
    given = dict(block.model.named_parameters())
    assert {name: given[name].dtype for name in given} == {name: p.dtype for name, p in expected.named_parameters()}
    buffers = dict(block.model.named_buffers())
    for name, buffer in expected.named_buffers():
        # What transformers makes in bfloat16 (the factor of Gemma's embedding) is rounded where it is used.
        assert torch.equal(buffers[name].to(buffer.dtype), buffer), name
    input_ids = torch.randint(3, 128, (1, 1000))
    with torch.no_grad():
        assert torch.equal(block(input_ids).logits, expected(input_ids=input_ids, use_cache=False).logits)


class _Router(PreTrainedModel):
    _keep_in_fp32_modules_strict = {"bias"}

    def __init__(self) -> None:
        super().__init__(tiny_config("llama"))
        self.bias, self.weight = (nn.Parameter(torch.full((2,), 1 + 2**-12)) for _ in range(2))
        self.register_buffer("load", torch.full((2,), 1 + 2**-12))
        self.post_init()


def test_what_transformers_keeps_in_float32_stays_so() -> None:
    outer = nn.Module()
    outer.router = router = _Router()
    cast_parameters(outer, "cpu", B16)
    assert [router.bias.dtype, router.weight.dtype, router.load.dtype] == [torch.float32, B16, torch.float32]

"""A class that does not split exactly is refused with the reason, before anything else is done."""

import pytest
import torch
from families import tiny_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
from transformers.models.bert import BertConfig

from lopt_pp.errors import LoptError
from lopt_pp.model.partition import BlockSpec, split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_sample, check_split, miniature_config


class SkipModel(LlamaModel):
    """Adds the first layer's output to the input of the last layer, across any boundary between them."""

    def __init__(self, config):
        super().__init__(config)
        self.layers[0].register_forward_hook(self.remember)
        self.layers[-1].register_forward_pre_hook(self.recall)

    def remember(self, layer, args, output):
        self.first = output

    def recall(self, layer, args):
        return (args[0] + getattr(self, "first", 0), *args[1:])


class SkipForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = SkipModel(config)


class SharedForCausalLM(LlamaForCausalLM):
    """Runs its final norm before the layers too."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.model.norm(self.model.embed_tokens(input_ids))
        return super().forward(inputs_embeds=inputs_embeds, **kwargs)


def test_a_connection_across_the_boundary_is_refused() -> None:
    config = tiny_config("llama")
    with pytest.raises(
        LoptError, match="SkipForCausalLM cannot be split exactly.*layers 0-1, layers 2-3.*besides the hidden"
    ):
        check_split(SkipForCausalLM, config, split_evenly(4, 2))


def test_layers_that_depend_on_others_cannot_be_an_auxiliary_network() -> None:
    """Of the sample, the first layer's output would be added to the input of the last."""
    config = tiny_config("llama")
    structure = check_split(SkipForCausalLM, config, [BlockSpec(0, 1, 0, 4)])
    check_sample(LlamaForCausalLM, config, structure, BlockSpec(1, 2, 2, 4, (2, 3)))
    with pytest.raises(LoptError, match="SkipForCausalLM cannot give layers 0, 3 to an auxiliary network"):
        check_sample(SkipForCausalLM, config, structure, BlockSpec(1, 2, 0, 4, (0, 3)))


def test_a_module_used_on_both_sides_is_refused() -> None:
    with pytest.raises(LoptError, match="its module model.norm is used in more than one place"):
        check_split(SharedForCausalLM, tiny_config("llama"), split_evenly(4, 2))


def test_a_bidirectional_model_is_refused() -> None:
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(LoptError, match="BertLMHeadModel is not causal"):
        check_split(model_class_of(config), config, split_evenly(2, 2))


def test_no_language_model_is_refused() -> None:
    from transformers import ViTConfig

    with pytest.raises(LoptError, match="vit is not a causal language model"):
        model_class_of(ViTConfig())


def test_the_check_leaves_the_random_state_and_the_config_alone() -> None:
    config = tiny_config("llama")
    before, state = config.to_dict(), torch.get_rng_state()
    check_split(LlamaForCausalLM, config, split_evenly(4, 2))
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_miniature_of_a_large_model_is_small() -> None:
    config = tiny_config(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        miniature = AutoModelForCausalLM.from_config(miniature_config(config))
    assert miniature.config.num_hidden_layers == 80
    assert sum(parameter.numel() for parameter in miniature.parameters()) < 100e6

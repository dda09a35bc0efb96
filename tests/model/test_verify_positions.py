"""Which families have a table of positions that ends is found by trying, not by their names."""

from typing import Any

import pytest
from families import tiny_config
from transformers import BloomConfig, GPTJConfig, OPTConfig, PreTrainedConfig

from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify_positions import position_limit, row_limits

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 40}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (tiny_config("gpt2", n_positions=48), 48),
        (OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=48), 48),
        (GPTJConfig(vocab_size=40, n_positions=48, n_embd=32, n_layer=2, n_head=2, rotary_dim=8), 48),
        (BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=2), None),
        (tiny_config("llama"), None),
        (tiny_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}), None),
        (tiny_config("mistral", sliding_window=4), None),
        (tiny_config("gpt_neox"), None),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else str(value),
)
def test_the_end_of_a_table_is_found(config: PreTrainedConfig, limit: int | None) -> None:
    assert position_limit(model_class_of(config), config) == limit


def test_what_a_model_takes_of_a_row() -> None:
    for family, limit in (("gpt2", 128), ("llama", None)):
        config = tiny_config(family)
        model = model_class_of(config)(config)
        assert row_limits(model, 129) == (128, 128, limit, 128)
        assert row_limits(model, 128) == (128, 128, None, 128), "no row can be too long"

"""The products of a stage under autocast are in bfloat16, those of experts among them."""

from typing import Any

import pytest
import torch
from families import tiny_config
from operators_seen import Seen
from small_stages import counts_of, microbatches, objective_of
from transformers import CONFIG_MAPPING, PreTrainedConfig

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.model.experts import autocast_experts
from lopt_pp.model.partition import split_evenly
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.planning.estimate import Model
from lopt_pp.stage.stage import Stage
from lopt_pp.util.compat_torch import FUSED_ATTENTION, GROUPED_PRODUCT

aten = torch.ops.aten
PRODUCTS = {GROUPED_PRODUCT, *FUSED_ATTENTION, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._addmm_activation}


def mixture(family: str) -> PreTrainedConfig:
    if family == "qwen3_moe":
        return tiny_config(family)
    settings: dict[str, Any] = {
        name: getattr(tiny_config("llama"), name) for name in ("vocab_size", "hidden_size", "num_attention_heads")
    }
    settings |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    settings |= {"head_dim": 32, "intermediate_size": 64, "pad_token_id": 0}
    return CONFIG_MAPPING[family](**settings)


def gradients(
    config: PreTrainedConfig, how: StageConfig, experts: str | None = None
) -> tuple[Seen, dict[str, torch.Tensor]]:
    """What the first of two stages runs in a microbatch, and the gradients of its block."""
    torch.manual_seed(0)
    model = Model(config, None)
    block = model.builder.with_random_weights(split_evenly(model.depth, 2)[0])
    if experts is not None:
        block.model.set_experts_implementation(experts)
    stage = Stage(block, local_objective(block, ObjectiveConfig(), 0), OptimConfig(), 10, config=how)
    (batch,) = microbatches([(12, 9), (5, 1)])
    with Seen() as seen:
        stage.run_microbatch(batch, None, step_count=objective_of(stage).count(counts_of(batch)))
    found = {name: parameter.grad for name, parameter in block.named_parameters()}
    return seen, {name: grad for name, grad in found.items() if grad is not None}


def dtypes_of_products(seen: Seen) -> set[torch.dtype]:
    """Of what is multiplied: the first two arguments."""
    return {
        argument.dtype
        for function, args, _ in seen.calls
        if function.overloadpacket in PRODUCTS
        for argument in [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()][:2]
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_products_of_experts_are_in_bfloat16_under_autocast(family: str) -> None:
    config = mixture(family)
    # Experts that are looped over, whose products autocast knows, differ in the order of sums only.
    _, expected = gradients(config, StageConfig(dtype="bfloat16"), experts="eager")
    seen, found = gradients(config, StageConfig(dtype="bfloat16"))
    assert GROUPED_PRODUCT in seen.packets and dtypes_of_products(seen) == {torch.bfloat16}
    assert found.keys() == expected.keys() and {grad.dtype for grad in found.values()} == {torch.float32}
    for name, grad in found.items():
        assert (grad - expected[name]).norm() <= 0.02 * expected[name].norm(), name
    seen, again = gradients(config, StageConfig(dtype="bfloat16", gradient_checkpointing=True))
    assert dtypes_of_products(seen) == {torch.bfloat16}
    assert all(torch.equal(grad, again[name]) for name, grad in found.items())


@pytest.mark.parametrize(("dtype", "products"), [("float32", torch.float32), ("pure_bfloat16", torch.bfloat16)])
def test_products_of_experts_without_autocast(dtype: Any, products: torch.dtype) -> None:
    """Are as `transformers` has them."""
    seen, _ = gradients(mixture("qwen3_moe"), StageConfig(dtype=dtype))
    assert GROUPED_PRODUCT in seen.packets and dtypes_of_products(seen) == {products}


def test_how_experts_are_multiplied_is_not_saved() -> None:
    model = Model(mixture("qwen3_moe"), None)
    block = model.builder.on_meta(split_evenly(model.depth, 2)[0])
    autocast_experts(block.model)
    assert model.config.to_dict() == block.model.config.to_dict()
    assert "grouped_mm" not in str(block.model.config.to_dict())

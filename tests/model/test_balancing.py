"""Balanced routers: the loss of transformers on one block, and the sum of the blocks' own where there are several."""

import copy
from typing import Any

import pytest
import torch
from families import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import IGNORE_INDEX, Microbatch, TokenCounts
from lopt_pp.errors import LoptError
from lopt_pp.model.balancing import check_routers
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.verify import check_split
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.stage.stage import Stage

COEFFICIENT = 0.5


def mixture(family: str) -> PreTrainedConfig:
    if family == "qwen3_moe":
        return tiny_config(family, mlp_only_layers=[])
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128}
    return AutoConfig.for_model(family, **small, **experts, pad_token_id=0)


def microbatch(index: int) -> Microbatch:
    """Two rows, one of which is padded."""
    torch.manual_seed(index)
    ids = torch.randint(3, 100, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    positions, targets = torch.arange(11), int(mask[:, 1:].sum())
    return Microbatch(0, index, ids, labels, mask, positions, int(mask.sum()), targets)


def stages_of(config: PreTrainedConfig, whole: Any, number: int, **settings: Any) -> list[Stage]:
    """The stages of a model with the weights of a whole one."""
    specs = split_evenly(4, number)
    builder = BlockBuilder(type(whole), config, check_split(type(whole), config, specs))
    stages = []
    for spec in specs:
        names = builder.on_meta(spec).model.state_dict()
        own = {name: tensor.clone() for name, tensor in whole.state_dict().items() if name in names}
        block = builder.from_state_dict(spec, own, "the whole model")
        block.balance_routers(COEFFICIENT, 1)
        objective = local_objective(block, ObjectiveConfig(), 0)
        stages.append(Stage(block, objective, OptimConfig(), 10, config=StageConfig(**settings)))
    return stages


def learn(stage: Stage, batches: list[Microbatch]) -> dict[str, float]:
    stage.begin_step(len(batches))
    for batch in batches:
        hidden_states = None if stage.block.spec.is_first else torch.randn(2, 12, 64)
        counts = TokenCounts(sum(each.num_tokens for each in batches), sum(each.num_targets for each in batches))
        stage.run_microbatch(batch, hidden_states, lambda sent: None, step_count=stage.count(counts))
    return stage.router_record()


def gradients_of_routers(stage: Stage) -> dict[str, torch.Tensor]:
    named = stage.block.named_parameters()
    return {name: own.grad.clone() for name, own in named if "gate.w" in name and own.grad is not None}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_block_learns_as_in_transformers(family: str, checkpointing: bool) -> None:
    config = mixture(family)
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config)
    whole.router_aux_loss_coef = COEFFICIENT
    (stage,) = stages_of(config, whole, 1, gradient_checkpointing=checkpointing)
    batches = [microbatch(0), microbatch(1)]
    record = learn(stage, batches)
    losses = []
    for batch in batches:
        masks = {"attention_mask": batch.token_mask.long(), "labels": batch.labels}
        output = whole(batch.input_ids, **masks, output_router_logits=True)
        (output.loss / len(batches)).backward()  # Both have as many targets.
        losses.append(output.aux_loss.item())
    assert record["router_aux_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6) and sum(losses) > 2
    expected = dict(whole.named_parameters())
    for name, parameter in stage.block.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-6)
    # Balancing has a part in it.
    stage.block.balancing = None
    before = gradients_of_routers(stage)
    stage.block.zero_grad()
    learn(stage, batches)
    after = gradients_of_routers(stage)
    assert before and not any(torch.allclose(after[name], own, rtol=0.1) for name, own in before.items())


def test_blocks_have_their_layers_share() -> None:
    """Of the same strength for each layer; a replica without a token, and an evaluation, have none of it."""
    config = mixture("qwen3_moe")
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config)
    for stage in stages_of(config, whole, 2):
        without = copy.deepcopy(stage.block)
        record = learn(stage, [microbatch(0)])
        assert 2 <= record["router_aux_loss"] < 4
        assert stage.block.balancing is not None and without.balancing is not None
        empty = microbatch(0).with_tensors(labels=torch.full((2, 12), IGNORE_INDEX))
        object.__setattr__(empty, "num_tokens", 0)
        assert learn(stage, [empty]) == {"router_aux_loss": 0.0}
        stage.begin_step(1)
        with stage.evaluating():
            inputs = None if stage.block.spec.is_first else torch.randn(2, 12, 64)
            stage.run_microbatch(microbatch(0), inputs, lambda sent: None)
        assert stage.router_record() == {"router_aux_loss": 0.0}


def test_models_without_routers_are_refused() -> None:
    dense = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(LoptError, match="--router_aux_loss_coef 0.1: LlamaForCausalLM is not a mixture of experts"):
        check_routers(type(dense), dense.config, 0.1)
    check_routers(type(dense), dense.config, 0.0)

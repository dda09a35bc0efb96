"""What the parts of a model cost."""

import pytest
import torch
from families import tiny_config

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.objectives import ObjectiveConfig
from lopt_pp.planning.profile import measure


@pytest.mark.parametrize("learned", [None, 1])
@pytest.mark.parametrize("local", ["reconstruction", "next_token", "none", "own_objective:TokenItself"])
def test_layers_of_a_kind_are_timed_once(local: str, learned: int | None) -> None:
    config = tiny_config("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0, 1, 2, 4])
    model_class = model_class_of(config)
    costs = measure(
        BlockBuilder(model_class, config, check_split(model_class, config, split_evenly(6, 2))),
        shape=(2, 16),
        accumulation=2,
        objective=ObjectiveConfig(local_objective=local, local_accumulation_steps=learned),
        optim=OptimConfig(),
        stage=StageConfig(),
        device=torch.device("cpu"),
    )
    for layers in (costs.layers, costs.earlier_layers):
        dense, sparse = {layers[number] for number in (0, 1, 2, 4)}, {layers[number] for number in (3, 5)}
        assert len(dense) == len(sparse) == 1 and dense != sparse and min(dense | sparse) > 0
    assert (costs.earlier_layers == costs.layers) == (local != "none" and learned is None)
    assert (costs.local_head > 0) == (local != "none")

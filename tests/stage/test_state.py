"""The state of a stage: what its next step depends on, saved and put back."""

from pathlib import Path

import pytest
import torch
from small_stages import accumulate, equal, make_warming_stage, microbatches, objective_of
from tiny import write_model

from lopt_pp.errors import LoptError
from lopt_pp.objectives import ObjectiveConfig
from lopt_pp.stage.stage import Stage


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


@pytest.mark.parametrize("done", [1, 3])
def test_a_stage_goes_on_from_its_state(llama: Path, done: int) -> None:
    """Within the warm-up, where the block has no moments yet, and after it. Frozen copies are not in it."""
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


def test_what_an_objective_holds_frozen_must_be_the_same(llama: Path) -> None:
    """It is not in the checkpoint, but read again from the model's files, which may have been edited."""
    config = ObjectiveConfig(local_objective="next_token")
    state = make_warming_stage(llama, config).state()
    again = make_warming_stage(llama, config)
    head = dict(objective_of(again).named_parameters())["network.model.lm_head.weight"]
    assert not head.requires_grad
    with torch.no_grad():
        head.view(-1)[0] += 1e-3
    with pytest.raises(LoptError, match="stage 0: the frozen weights of its objective are not those that"):
        again.resume(state, 1)
    del state["frozen_sha256"]  # As in checkpoints of versions before.
    again.resume(state, 0)

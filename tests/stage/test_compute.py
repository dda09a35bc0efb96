"""What flags make of a block: noise on its embeddings while it learns, and how its layers are compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_stages import make_block, microbatches
from tiny import write_model
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from lopt_pp.config.compute import StageConfig
from lopt_pp.model.partition import split_evenly
from lopt_pp.stage.compute import measuring, prepare_block

FIRST, LAST = split_evenly(4, 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


def test_noise_is_that_of_transformers_while_the_first_block_learns(llama: Path) -> None:
    device = torch.device("cpu")
    block = prepare_block(make_block(llama, FIRST), StageConfig(neftune_noise_alpha=5.0), device)
    plain = prepare_block(make_block(llama, FIRST), StageConfig(), device)
    (batch, *_) = microbatches()
    embeddings: Any = plain.model.get_input_embeddings()
    torch.manual_seed(1)
    entered = block(input_ids=batch.input_ids).inputs
    torch.manual_seed(1)
    embeddings.neftune_noise_alpha = 5.0
    expected = neftune_post_forward_hook(embeddings, (), embeddings(batch.input_ids))
    assert torch.equal(entered, expected) and not torch.equal(entered, embeddings(batch.input_ids))
    with measuring(list(block.modules()), compiles=False):
        assert torch.equal(block(input_ids=batch.input_ids).inputs, embeddings(batch.input_ids))
    later = prepare_block(make_block(llama, LAST), StageConfig(neftune_noise_alpha=5.0), device)
    hidden_states = torch.randn(1, 3, 64)
    assert torch.equal(later(hidden_states=hidden_states).inputs, hidden_states)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"torch_compile": True}, {}),
        ({"torch_compile_backend": "eager"}, {"backend": "eager"}),
        ({"torch_compile_mode": "default"}, {"mode": "default"}),
        ({}, None),
    ],
)
def test_layers_are_compiled_as_flags_say(
    llama: Path, flags: dict[str, Any], expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: seen.append(how))
    prepare_block(make_block(llama, LAST), StageConfig(**flags), torch.device("cpu"))
    assert seen == ([] if expected is None else [expected] * 2)

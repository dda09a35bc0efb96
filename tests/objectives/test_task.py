"""The task's loss has one door: whatever learns from it, is measured by it or names it asks there."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from microbatch import HIDDEN, VOCABULARY, make_batch, random_output
from small_stages import counts_of
from torch import nn

import lopt_pp
from lopt_pp.config.compute import StageConfig
from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.model.block import BlockOutput
from lopt_pp.objectives import (
    AuxiliaryNextToken,
    NextToken,
    Objective,
    ObjectiveConfig,
    Site,
    local_objective,
    nothing_to_load,
    task,
    task_objective,
    task_objective_class,
)
from lopt_pp.stage.end_to_end import PipelineModule

PACKAGE = Path(lopt_pp.__file__).parent


class Squares(Objective):
    """Another task: logits are to be small."""

    name = "squares_loss"

    def count(self, counts: TokenCounts) -> int:
        return 2 * counts.num_targets

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        assert output.logits is not None
        return output.logits.square().sum()


class Network(nn.Module):
    """In place of the rest of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.model = SimpleNamespace(get_output_embeddings=lambda: self.head)

    def forward(self, hidden_states: torch.Tensor, **wanted: Any) -> BlockOutput:
        return BlockOutput(hidden_states, hidden_states, self.head(hidden_states))


def test_the_task_is_the_next_token() -> None:
    assert task_objective_class(ObjectiveConfig()) is NextToken
    assert isinstance(task_objective(ObjectiveConfig(method="e2e")), NextToken)


def test_another_task_reaches_all_that_learn_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "NextToken", Squares)
    config, output, batch = ObjectiveConfig(local_objective="next_token"), random_output(), make_batch()
    last: Any = SimpleNamespace(spec=SimpleNamespace(is_last=True))
    assert isinstance(local_objective(last, config, seed=0, load=nothing_to_load), Squares)

    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=4), get_input_embeddings=lambda: None)
    spec = SimpleNamespace(sample_after=lambda depth, number: None)
    block: Any = SimpleNamespace(model=model, spec=spec)
    network: Any = Network()
    auxiliary = AuxiliaryNextToken(Site(block, config, torch.Generator(), lambda spec: network))
    assert auxiliary.count(counts_of(batch)) == 2 * batch.num_targets
    torch.testing.assert_close(auxiliary(output, batch), network.head(output.hidden_states).square().sum())

    module = PipelineModule(nn.Module(), StageConfig(), seed=0, splits_backward=False, objective=config)  # type: ignore[arg-type]
    assert any(isinstance(part, Squares) for part in module.modules())


def test_nobody_else_names_its_class() -> None:
    """Within the package; `lopt_pp.objectives` hands it on to users."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Name) and node.id == "NextToken":
                found.add(file.relative_to(PACKAGE).as_posix())
    assert found == {"objectives/task.py"}

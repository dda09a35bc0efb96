"""From a step's first microbatch to its optimizer step, no stage makes the host wait for its GPU."""

import functools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_stages import FIRST, HIDDEN, LAST, make_block
from tiny import write_model

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import Microbatch
from lopt_pp.data.encoding import EncodedRow
from lopt_pp.data.microbatch import collate
from lopt_pp.model.block import BlockOutput
from lopt_pp.model.partition import BlockSpec, split_evenly
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.stage.end_to_end import EndToEndPipeline, clip_grad_norm
from lopt_pp.stage.stage import Stage
from lopt_pp.util.host_waits import HostWait, HostWaits

(WHOLE,) = split_evenly(4, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


def a_step(packed: bool) -> list[Microbatch]:
    """Two microbatches of two sequences, one of them shorter; packed, each sequence has two rows."""
    rows = [EncodedRow(list(range(3, 3 + size)), [-100, -100, *range(5, 3 + size)]) for size in (9, 7, 6, 5)]
    packs = [[rows[0], rows[1]], [rows[2], rows[3]]] if packed else [[rows[0]], [rows[1]]]
    return [collate(packs, 0, index, pad_token_id=0, keep_apart=packed) for index in range(2)]


def make_stage(model: Path, spec: BlockSpec, local: str, **config: object) -> Stage:
    block, objectives = make_block(model, spec), ObjectiveConfig(local_objective=local)
    objective = local_objective(block, objectives, 0, functools.partial(make_block, model))
    return Stage(block, objective, OptimConfig(), 10, config=StageConfig(**config))  # type: ignore[arg-type]


def waits_of_a_step(stage: Stage, batches: Sequence[Microbatch]) -> list[HostWait]:
    """What waits before the optimizer's step, all microbatches of which are there."""
    received = [None if stage.index == 0 else torch.randn(*batch.input_ids.shape, HIDDEN) for batch in batches]
    with HostWaits(stage.device) as waits:
        for number, batch in enumerate(batches):
            stage.run_microbatch(
                batch.to(stage.device),
                received[number],
                None,
                step_count=20 if stage.learns else None,
                is_last=number == len(batches) - 1,
            )
    return waits.found


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("local", ["reconstruction", "next_token", "none", "task"])
def test_a_step_does_not_wait(model: Path, local: str, packed: bool) -> None:
    """The optimizer's step has one wait, for all losses and the norm; what clips the gradient has none."""
    spec = LAST if local == "task" else FIRST
    for config in ({}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}):
        stage = make_stage(model, spec, "none" if local == "task" else local, **config)
        assert waits_of_a_step(stage, a_step(packed)) == []
        with HostWaits(stage.device) as waits:
            if stage.optimizer is not None:
                stage.optimizer.clip()
        assert waits.found == []
        if stage.optimizer is not None:
            stage.optimizer.step = lambda: None  # type: ignore[method-assign]  # It knows its step by itself.
            with HostWaits(stage.device) as waits:
                stage.step(0)
            assert [wait.operator for wait in waits.found] == ["tolist"]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_neither_does_one_end_to_end(model: Path, packed: bool) -> None:
    block = make_block(model, WHOLE)
    pipeline = EndToEndPipeline([block], None, config=StageConfig(), objective=ObjectiveConfig())
    batches = a_step(packed)
    with HostWaits() as waits:
        pipeline.step(batches, 20)
        clip_grad_norm(block.parameters(), 1.0, None)
    assert waits.found == []
    with HostWaits() as waits:
        pipeline.evaluate(batches)
    assert waits.found == []


def test_held_out_rows_are_run_without_a_wait(model: Path) -> None:
    stage = make_stage(model, FIRST, "reconstruction")
    batches = a_step(packed=False)
    with HostWaits() as waits, stage.evaluating():
        losses = [stage.run_microbatch(batch, None, None) for batch in batches]
    assert waits.found == [] and all(loss is not None for loss in losses)


def test_neither_does_the_package_wait_by_an_objective_with_all_logits(model: Path) -> None:
    """As `--method e2e` has them in schedules that run backward in two passes."""
    stage = make_stage(model, LAST, "none")
    (batch, _), objective = a_step(packed=False), stage.objective
    assert objective is not None
    logits = torch.randn(2, len(batch.target_positions), 128, requires_grad=True)
    with HostWaits() as waits:
        objective(BlockOutput(torch.zeros(()), torch.zeros(()), logits), batch).backward()
    assert waits.found == []

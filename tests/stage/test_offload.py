"""State and activations that are in main memory between uses: the same bits, and less in a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_config
from small_stages import UNEVEN, accumulate, make_block, microbatches
from tiny import write_model
from torch import nn

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.partition import split_evenly
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.planning.estimate import Model
from lopt_pp.planning.workload import Workload
from lopt_pp.stage import activation_offload, optimizer_offload
from lopt_pp.stage.activation_offload import OffloadedActivations
from lopt_pp.stage.stage import Stage

FIRST, LAST = split_evenly(4, 2)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), tie_word_embeddings=False)


def trained(model: Path, device: str, optim: OptimConfig, steps: range, state: Any = None, **config: Any) -> Any:
    """The state of a stage after some steps, which go on from another state if it is given."""
    block = make_block(model, LAST)
    objective = local_objective(block, ObjectiveConfig(), 0)
    stage = Stage(block, objective, optim, 10, config=StageConfig(**config), device=device)
    if state is not None:
        stage.resume(state, steps.start)
    for step in steps:
        accumulate(stage, [batch.to(device) for batch in microbatches(UNEVEN, step=step)])
        stage.step(step)
    return stage.state()


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "adafactor", "muon", "sgd"])
def test_state_in_main_memory_gives_the_same_bits(
    llama: Path, name: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a resume, to and from a run that keeps it on the device."""
    monkeypatch.setattr(optimizer_offload, "_CHUNK_BYTES", 2**15)
    optim = OptimConfig(learning_rate=1e-2, optim=name)
    offloaded = replace(optim, optimizer_offload=True)
    before = trained(llama, device, optim, range(2))
    expected = trained(llama, device, optim, range(2, 4), before)
    for first, then in ((offloaded, offloaded), (offloaded, optim), (optim, offloaded)):
        state = trained(llama, device, then, range(2, 4), trained(llama, device, first, range(2)))
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_an_optimizer_is_stepped_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.ones(64)) for _ in range(5)]
    seen: list[int] = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(sum(len(group["params"]) for group in self.param_groups))
            return super().step(closure)

    inner = Counting([{"params": parameters[:3]}, {"params": parameters[3:]}], lr=0.5)
    monkeypatch.setattr(optimizer_offload, "_CHUNK_BYTES", 2 * 64 * 4)
    for parameter in parameters:
        parameter.grad = torch.ones(64)
    offloaded = optimizer_offload.OffloadedState(inner, torch.device("cpu"))
    offloaded.step()
    assert seen == [2, 2, 1] and all(torch.equal(parameter, torch.full((64,), 0.5)) for parameter in parameters)
    assert [len(group["params"]) for group in inner.param_groups] == [3, 2]
    assert offloaded.share_on_device == 1.0


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "schedule_free_adamw"])
def test_optimizers_whose_state_cannot_be_elsewhere(name: Any) -> None:
    with pytest.raises(LoptError, match=f"--optimizer_offload with --optim {name}: "):
        OptimConfig(optim=name, optimizer_offload=True)


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_in_main_memory_give_the_same_bits(
    llama: Path, device: str, checkpointing: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where there is nowhere to go, copies are made all the same here."""
    kept: list[tuple[int, ...]] = []
    keep = OffloadedActivations._keep

    def keeping(self: OffloadedActivations, tensor: torch.Tensor) -> Any:
        kept.append(tuple(tensor.shape))
        assert not isinstance(tensor, nn.Parameter)
        return keep(self, tensor)

    monkeypatch.setattr(OffloadedActivations, "_keep", keeping)
    monkeypatch.setattr(
        activation_offload,
        "OffloadedActivations",
        lambda device: OffloadedActivations(device, copies=True),
    )
    optim, config = OptimConfig(learning_rate=1e-2), {"gradient_checkpointing": checkpointing, "dtype": dtype}
    expected = trained(llama, device, optim, range(2), **config)
    assert not kept
    state = trained(llama, device, optim, range(2), activation_offloading=True, **config)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert kept and (len(kept) < 40) == checkpointing


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_counts_what_is_elsewhere(checkpointing: bool) -> None:
    model = Model(tiny_config("llama", vocab_size=512, num_hidden_layers=8), None)
    given = Workload(4, 256, 1, stage=StageConfig(gradient_checkpointing=checkpointing))
    there = model.process([split_evenly(8, 2)[0]], given)
    stage = replace(given.stage, activation_offloading=True)
    elsewhere = model.process([split_evenly(8, 2)[0]], replace(given, stage=stage))
    assert elsewhere.kept < 0.25 * there.kept
    assert elsewhere.memory.activations < there.memory.activations * (0.99 if checkpointing else 0.5)
    on_cpu = model.process([split_evenly(8, 2)[0]], replace(given, stage=stage, device=torch.device("cpu")))
    plain = model.process([split_evenly(8, 2)[0]], replace(given, device=torch.device("cpu")))
    assert on_cpu.memory == plain.memory


def test_a_plan_counts_state_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_offload, "_CHUNK_BYTES", 2**16)
    model = Model(tiny_config("llama", vocab_size=512, num_hidden_layers=8), None)
    given = Workload(4, 64, 1)
    there = model.process([split_evenly(8, 1)[0]], given).memory.optimizer
    optim = OptimConfig(optimizer_offload=True)
    assert model.process([split_evenly(8, 1)[0]], replace(given, optim=optim)).memory.optimizer < 0.6 * there
    cpu = torch.device("cpu")
    on_cpu = [
        model.process([split_evenly(8, 1)[0]], replace(given, optim=own, device=cpu)) for own in (optim, given.optim)
    ]
    assert on_cpu[0].memory.optimizer == on_cpu[1].memory.optimizer

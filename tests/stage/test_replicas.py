"""What replicas add to a stage is where its gradients are: not another result, and no more memory than is planned."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from families import tiny_config
from ranks import to_the_end
from torch.distributed.device_mesh import init_device_mesh

from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.optimizer_names import Optim, optimizer_kind
from lopt_pp.errors import LoptError
from lopt_pp.model.partition import split_evenly
from lopt_pp.objectives import local_objective
from lopt_pp.planning.estimate import Model
from lopt_pp.planning.memory_tracker import MemoryTracker
from lopt_pp.planning.synthetic import random_microbatch
from lopt_pp.planning.workload import Workload
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.stage.stage import Stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    """One replica: what DDP holds does not depend on how many there are."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Replicas(init_device_mesh("cpu", (1,)), sharded=False)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_config("llama", vocab_size=512), None)


def make_stage(model: Model, given: Workload, replicas: Replicas | None, warmup_steps: int = 0) -> Stage:
    torch.manual_seed(0)
    block = model.builder.with_random_weights(split_evenly(model.depth, 2)[0])
    objective = local_objective(block, given.objective, 0, model.builder.with_random_weights)
    return Stage(block, objective, given.optim, 10, local_head_warmup_steps=warmup_steps, replicas=replicas)


def train(stage: Stage, given: Workload, vocabulary: int, step: int) -> None:
    torch.manual_seed(step)
    batch = random_microbatch((given.rows, given.tokens), vocabulary, CPU)
    for number in range(given.accumulation):
        is_last = number == given.accumulation - 1
        stage.run_microbatch(batch, None, lambda sent: None, step_count=batch.num_tokens, is_last=is_last)
    stage.step(step)


def test_a_dtype_that_fsdp_cannot_gather_with_the_others_is_refused(replicas: Replicas) -> None:
    module = torch.nn.Linear(4, 4).bfloat16()
    module.bias = torch.nn.Parameter(module.bias.float())
    said = "^--dtype pure_bfloat16 with --sharding full: transformers keeps bias in float32"
    with pytest.raises(LoptError, match=said):
        replace(replicas, sharded=True).join(module)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_memory_is_what_is_planned(model: Model, replicas: Replicas, accumulation: int) -> None:
    """In the first steps, too, between which DDP makes its buckets anew."""
    given = Workload(2, 32, accumulation, device=CPU, replicas=2)
    tracker, peaks = MemoryTracker(), []
    with tracker:
        stage = make_stage(model, given, replicas)
        tracker.note([*stage.block.parameters(), *stage.block.buffers()], "weights")
        for step in range(3):
            tracker.forget_peak()
            train(stage, given, 512, step)
            peaks.append(sum(tracker.peak.values()))
    planned = model.process([stage.block.spec], given).memory
    assert peaks[-1] == pytest.approx(planned.total - planned.queue, rel=0.03)
    assert max(peaks) <= 1.03 * peaks[-1]


def test_weights_are_those_without_replicas(model: Model, replicas: Replicas) -> None:
    """Also of a block that waits for its head, which is not to be decayed meanwhile, and begins then."""
    given = Workload(2, 32, 2, device=CPU)
    given = replace(given, optim=replace(given.optim, learning_rate=1e-2, weight_decay=0.1))
    alone, replicated = (make_stage(model, given, own, warmup_steps=2) for own in (None, replicas))
    before = {name: parameter.clone() for name, parameter in alone.block.named_parameters()}
    for step in range(5):
        for stage in (alone, replicated):
            train(stage, given, 512, step)
        own = dict(replicated.block.named_parameters())
        assert all(torch.equal(parameter, own[name]) for name, parameter in alone.block.named_parameters()), step
        assert all(torch.equal(parameter, before[name]) for name, parameter in own.items()) == (step < 2)
    replicated.freeze()
    assert all(parameter.grad is None for parameter in replicated.block.parameters())


@pytest.mark.parametrize("name", [name for name in get_args(Optim) if not optimizer_kind(name).unsharded])
def test_sharded_state_goes_on_as_whole_state_does(model: Model, replicas: Replicas, name: Any) -> None:
    """From a stage that has it whole to one that has a shard of it, and with the averages of schedule-free."""
    if (package := optimizer_kind(name).package) is not None:
        pytest.importorskip(package)
    given = Workload(2, 32, 1, device=CPU, optim=OptimConfig(learning_rate=1e-2, optim=name))
    alone, sharded = make_stage(model, given, None), make_stage(model, given, replace(replicas, sharded=True))
    train(alone, given, 512, 0)
    sharded.resume(alone.state(), 1)
    with sharded.evaluating():
        pass
    for stage in (alone, sharded):
        train(stage, given, 512, 1)
    whole, joined = alone.state(), sharded.state()
    assert whole.keys() == joined.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(joined[key], tensor, msg=key)


def test_state_that_is_sharded_and_offloaded_goes_on_as_whole_state_does(model: Model, replicas: Replicas) -> None:
    optim = OptimConfig(learning_rate=1e-2, weight_decay=0.1)
    given = Workload(2, 32, 1, device=CPU, optim=optim)
    elsewhere = replace(given, optim=replace(optim, optimizer_offload=True))
    alone, sharded = make_stage(model, given, None), make_stage(model, elsewhere, replace(replicas, sharded=True))
    train(alone, given, 512, 0)
    sharded.resume(alone.state(), 1)
    for step in (1, 2):
        for stage in (alone, sharded):
            train(stage, given, 512, step)
    whole, joined = alone.state(), sharded.state()
    assert whole.keys() == joined.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(joined[key], tensor, msg=key)


def test_two_ranks_learn_what_one_process_does(tmp_path: Path) -> None:
    """With balanced routers, by DDP, FSDP2 and 1F1B; with state and activations in main memory, the same bits."""
    to_the_end(tmp_path, 2, [tmp_path / "found.json"], module="replicas_worker")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 9 and not any(found.values()), found

"""Builds what a process trains from a run's setup: its stages, the drift probe, and the plan of a step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lopt_pp.data import MicrobatchesAhead
from lopt_pp.distributed.groups import pipeline_group, replica_mesh
from lopt_pp.distributed.shutdown import RunLength
from lopt_pp.distributed.world import World
from lopt_pp.metrics.drift import Probe
from lopt_pp.model.build import Keep
from lopt_pp.model.verify_positions import trained_positions
from lopt_pp.objectives import local_objective, local_objective_class
from lopt_pp.stage.base import BaseStage
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.stage.end_to_end_stage import EndToEndStage
from lopt_pp.stage.optimizer_kinds import OptimizerFactory
from lopt_pp.stage.stage import Stage
from lopt_pp.training.held_out import Evaluation
from lopt_pp.training.phases import DriftProbe, EndToEndHeldOutRows, EndToEndTraining, HeldOutRows, LocalTraining
from lopt_pp.training.setup import Setup
from lopt_pp.training.step_plan import Phase, StepPlan


def build_stages(
    setup: Setup, world: World, optimizer_factory: Callable[[int], OptimizerFactory | None] = lambda stage: None
) -> Sequence[BaseStage]:
    """Builds the stages of this process, with their pretrained weights. All processes must call this.

    Args:
        setup: of the run.
        world: this process.
        optimizer_factory: of each stage by its number, what makes its optimizer in the place of the one that `--optim`
            names; None for that one.

    Returns:
        They are `Stage`s; in an end-to-end run over several processes, one `EndToEndStage`.
    """
    config, topology = setup.config, setup.topology
    # Groups are made by all processes together, before blocks take their different times to load.
    group = pipeline_group(topology) if setup.is_end_to_end else None
    replicas = None
    if topology.num_replicas > 1:
        replicas = Replicas(replica_mesh(world.device, topology), sharded=config.pipeline.sharding == "full")
    common: dict[str, Any] = {
        "config": config.stage,
        "seed": config.run.seed,
        "device": world.device,
        "replicas": replicas,
    }
    stages: list[BaseStage] = []
    for index in topology.stages_of(world.rank):
        device, keep = _place(setup, index, world.device, replicas)
        block = setup.load(setup.specs[index], device, keep)
        load_copy = functools.partial(setup.load_copy, device=device, keep=keep)
        if not config.objective.train_embeddings:
            block.freeze_embeddings()
        if (coefficient := config.objective.router_aux_loss_coef) and (group or setup.loss_names[index]):
            block.balance_routers(coefficient, topology.num_replicas)
        if group is not None:
            end_to_end = EndToEndStage(
                block,
                config.optim,
                setup.num_steps,
                group,
                objective=config.objective,
                optimizer_factory=optimizer_factory(index),
                **common,
            )
            stages.append(end_to_end)
            continue
        stage = Stage(
            block,
            local_objective(block, config.objective, config.run.seed, load_copy),
            config.optim,
            setup.num_steps,
            local_head_warmup_steps=config.objective.local_head_warmup_steps,
            local_accumulation_steps=config.objective.local_accumulation_steps,
            optimizer_factory=optimizer_factory(index),
            **common,
        )
        stages.append(stage)
    return stages


def _place(
    setup: Setup, index: int, device: torch.device, replicas: Replicas | None
) -> tuple[torch.device, Keep | None]:
    """Where a stage's weights are put as they are read, and what is kept of them there."""
    is_last = index == setup.topology.num_stages - 1
    objective = None if is_last else local_objective_class(setup.config.objective)
    only_runs = objective is None and not is_last
    if objective is not None and objective.reads_weights:
        return torch.device("cpu"), None
    # A stage that only runs in 16 bits may fill a GPU that has no room for it in float32: it is cast on its way there.
    if only_runs and setup.config.stage.parameter_dtype.itemsize < 4:
        return torch.device("cpu"), None
    # A stage without a loss is not sharded: it only runs forward.
    is_shared_out = replicas is not None and replicas.sharded and not only_runs
    return device, replicas.keep if replicas is not None and is_shared_out else None


def remember_pretrained(setup: Setup, world: World, stages: Sequence[BaseStage]) -> Probe | None:
    """Runs the drift probe through the stages while they have their pretrained weights. All processes must call this.

    Returns:
        What measures the boundaries' drift from then on; None where nothing can drift.
    """
    every = setup.config.report.probe_steps
    if every == 0 or setup.loss_names[0] is None or setup.topology.num_stages == 1 or setup.is_end_to_end:
        return None
    # All replicas have the same probe.
    most = trained_positions(setup.model_config)
    probe = Probe(setup.sampler(0), every, setup.topology.num_stages, most)
    world.barrier("probe")  # All have loaded their blocks: nobody waits long for another.
    probe.remember([stage for stage in stages if isinstance(stage, Stage)], setup.topology, world.rank)
    return probe


def step_plan(setup: Setup, world: World, probe: Probe | None, length: RunLength) -> StepPlan[Any]:
    """What each step of a run of this length consists of, in order."""
    replica = setup.topology.replica_of(world.rank)
    sampler, evaluation = setup.sampler(replica), _evaluation(setup, replica, length)
    on_gpu = world.device.type == "cuda"
    ahead = MicrobatchesAhead(sampler, setup.num_steps, in_thread=on_gpu, pins=on_gpu)
    training = EndToEndTraining if setup.is_end_to_end else LocalTraining
    phases: list[Phase[Any]] = [training(sampler, ahead)]
    if probe is not None:
        limit = setup.config.objective.max_interface_drift
        phases.append(DriftProbe(probe, math.inf if limit is None else limit))
    if evaluation is not None:
        held_out = EndToEndHeldOutRows if setup.is_end_to_end else HeldOutRows
        phases.append(held_out(evaluation, setup.metrics))
    return StepPlan(sampler, phases)


def _evaluation(setup: Setup, replica: int, length: RunLength) -> Evaluation | None:
    """The held-out rows of a replica, and when they are run."""
    config = setup.config.evaluation
    if setup.held_out is None:
        return None
    steps_per_epoch = setup.sampler(replica).steps_per_epoch
    return Evaluation(
        setup.held_out,
        eval_steps=config.every(steps_per_epoch),
        first_step=config.first_step(steps_per_epoch),
        length=length,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        pad_token_id=setup.pad_token_id,
        on_start=config.eval_on_start,
        chooses=setup.config.chooses,
        replica=replica,
        num_replicas=setup.topology.num_replicas,
    )

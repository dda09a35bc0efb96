"""The pipeline benchmark in one of its processes: finds every method's best split, then lets the methods take turns."""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from benchmarks.helpers.synthetic import FORMATS
from benchmarks.speed.local_learning import Computing
from benchmarks.speed.methods import METHODS
from benchmarks.speed.pipeline_results import Cell, Computed, report, result_of
from benchmarks.speed.shared_model import PROCESSES, Cut, Method, SharedModel, Trial
from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.distributed.world import connect


def run(arguments: argparse.Namespace) -> None:
    """One process's part."""
    transformers_logging.disable_progress_bar()
    if arguments.device == "cuda" and torch.cuda.device_count() < PROCESSES:
        # NCCL refuses two ranks on one GPU of one host; with another name each passes for a host of its own.
        os.environ["NCCL_HOSTID"] = f"rank-{os.environ['RANK']}"
    backend: Literal["nccl", "gloo"] = "nccl" if arguments.device == "cuda" else "gloo"
    with connect(PipelineConfig(num_stages=PROCESSES, backend=backend)) as world:

        def note(progress: str) -> None:
            if world.rank == 0:
                print(progress, file=sys.stderr, flush=True)

        group = dist.new_group(list(range(PROCESSES)), backend=backend)
        dtype = getattr(torch, arguments.dtype)
        shared_models = {model: SharedModel(world, group, FORMATS[model], dtype) for model in arguments.models}
        cuts = {}
        for model, shared in shared_models.items():
            in_search = sorted(arguments.microbatches)[(len(arguments.microbatches) - 1) // 2]
            cuts[model] = find_cuts(shared, arguments.methods, in_search, search=not arguments.quick)
            note(f"{model}: blocks begin at layers {cuts[model]}")
        cells, slowdowns = run_rounds(shared_models, cuts, arguments, note)
        if world.rank == 0:
            print("\n".join(report(cells, cuts, slowdowns)))
            result = result_of(cells, cuts, slowdowns, world.device, arguments)
            arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def gather(trial: Trial) -> list[Trial]:
    """The trials of all processes, by rank."""
    trials: list[Any] = [None] * PROCESSES
    dist.all_gather_object(trials, trial)
    return trials


def seconds_per_step(method: Method, microbatches: int, steps: int) -> float:
    """Runs a trial in all processes together."""
    trials = gather(method.run(microbatches, steps))
    # One clock for all processes of a machine.
    return (max(trial.end for trial in trials) - max(trial.begin for trial in trials)) / steps


def compute(method: Computing, microbatches: int, steps: int) -> list[Computed]:
    """What the stages compute, by rank."""
    return [Computed(trial.microbatch, trial.optimizer) for trial in gather(method.run(microbatches, steps))]


def find_cuts(shared: SharedModel, methods: Sequence[str], microbatches: int, search: bool) -> dict[str, Cut]:
    """The split of each method: of a few around the balance of measured costs, the one whose trial is the shortest."""
    depth = shared.config.num_hidden_layers
    middle = depth // 2
    first, last = compute(Computing(shared, (middle,)), 1, 4 * shared.shape.trial)
    layer = first.microbatch / middle
    # The output head and the loss, in layers.
    head = max(last.microbatch / layer - (depth - middle), 0.0)
    cuts: dict[str, Cut] = {}
    for name in methods:
        candidates = cuts_around(depth, head, METHODS[name].num_blocks)
        if name in ("naive", "gpipe") and "1f1b" in cuts:
            # GPipe's stages have the same work, in another order; of naive halves only one works at a time.
            candidates = [cuts["1f1b"]]
        if search and len(candidates) > 1:
            steps = math.ceil(shared.shape.trial / microbatches)
            seconds = {cut: seconds_per_step(METHODS[name](shared, cut), microbatches, steps) for cut in candidates}
            candidates.sort(key=seconds.__getitem__)
        cuts[name] = candidates[0]
    return cuts


def cuts_around(depth: int, head: float, num_blocks: int) -> list[Cut]:
    """Splits of `depth` layers and a head that costs as much as `head` of them: the balanced one, then its neighbours.

    Neighbours have the last boundary one layer earlier or later, which moves a layer from one process to the other.
    """
    if num_blocks == 1:
        return [()]
    balanced = [round(number * (depth + head) / num_blocks) for number in range(1, num_blocks)]
    # At least a layer in every block, also in the last one, however much the head costs.
    balanced = [max(min(edge, depth - num_blocks + number), number) for number, edge in enumerate(balanced, 1)]
    cuts = [(*balanced[:-1], balanced[-1] + shift) for shift in (0, -1, 1)]
    return [cut for cut in cuts if cut[-1] < depth and all(a < b for a, b in zip((0, *cut), cut, strict=False))]


def run_rounds(
    shared_models: Mapping[str, SharedModel],
    cuts: Mapping[str, Mapping[str, Cut]],
    arguments: argparse.Namespace,
    note: Callable[[str], None],
) -> tuple[list[Cell], dict[str, list[float]]]:
    """Measures everything, round after round.

    Returns:
        The measurements, and by model how many times slower a stage computes while the other one works, per round.
    """
    begun = time.perf_counter()
    cells = [Cell(model, number) for model in shared_models for number in arguments.microbatches]
    slowdowns: dict[str, list[float]] = defaultdict(list)
    methods = {
        model: {name: METHODS[name](shared, cuts[model][name]) for name in arguments.methods}
        for model, shared in shared_models.items()
    }
    together = {model: Computing(shared, cuts[model]["lopt"]) for model, shared in shared_models.items()}
    in_turn = {model: Computing(shared, cuts[model]["lopt"], in_turn=True) for model, shared in shared_models.items()}
    for model in shared_models:
        for method in methods[model].values():
            seconds_per_step(method, min(arguments.microbatches), 1)  # Touches memory for the first time.
    done, round_begun = 0, time.perf_counter()
    while not _enough(done, begun, round_begun, arguments):
        round_begun = time.perf_counter()
        for cell in cells:
            trial = shared_models[cell.model].shape.trial
            # Steps of the others begin and end together in all processes. Stages that run ahead of each other need a
            # longer run for their mean to settle.
            steps, longer = math.ceil(trial / cell.microbatches), math.ceil(4 * trial / cell.microbatches)
            for name in _rotated(arguments.methods, done):
                method, own = methods[cell.model][name], name == "lopt"
                seconds = seconds_per_step(method, cell.microbatches, longer if own else steps)
                cell.seconds.setdefault(name, []).append(seconds)
                if own:
                    computed = compute(together[cell.model], cell.microbatches, longer)
            busiest = max(range(PROCESSES), key=lambda rank: computed[rank].step(cell.microbatches))
            cell.computing.append(computed[busiest])
            if cell.microbatches == min(arguments.microbatches):
                alone = compute(in_turn[cell.model], 1, 2 * trial)[busiest].microbatch
                slowdowns[cell.model].append(computed[busiest].microbatch / alone)
            note(f"round {done + 1}: {cell.model}, {cell.microbatches} microbatches per step")
        done += 1
    return cells, dict(slowdowns)


def _enough(done: int, begun: float, round_begun: float, arguments: argparse.Namespace) -> bool:
    """Whether no further round fits into the time given: all processes do as rank 0 decides."""
    now = time.perf_counter()
    if arguments.rounds:
        return done >= arguments.rounds
    decision = [done >= 2 and now - begun + (now - round_begun) > 60 * arguments.minutes]
    dist.broadcast_object_list(decision, 0)
    return decision[0]


def _rotated(names: Sequence[str], by: int) -> list[str]:
    """Another one first in every round."""
    by %= len(names)
    return [*names[by:], *names[:by]]

"""What each local objective costs: seconds per microbatch and peak memory of each of two stages.

    python -m benchmarks.speed.objectives [--quick] [--device cuda] [--model smollm2-135m] [--output objectives.json]

Each stage is measured by itself, in a fresh process, on hidden states that are there already: nothing waits. The cuts
are the midpoint, and those that `--split auto` finds with the objective. Columns:

  cut          layers of the first stage and of the second.
  first, last  milliseconds of a microbatch: forward, loss, backward, and its share of the optimizer step; the median.
  busiest      the longer of the two, over that of --local_objective none at the midpoint. Stages work side by side, so
               this is what a pipeline of two processes takes.
  MiB          the most that training takes in the process: weights, gradients, AdamW's state, activations.

On CPUs memory is resident memory, less that of a process that has only imported the program.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# Before PyTorch: one thread in each process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.helpers.machine import describe_machine, one_line
from benchmarks.helpers.process_memory import MemoryTracker, give_back_at_once, reason_not_possible
from benchmarks.helpers.synthetic import FORMATS, MANY_STEPS, OPTIM, model_config, model_structure
from benchmarks.helpers.workers import Workers, free_port
from lopt_pp.config.compute import StageConfig
from lopt_pp.data import TokenCounts
from lopt_pp.distributed.world import World
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_at
from lopt_pp.model.structure import ModelStructure
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.planning.balance import balance
from lopt_pp.planning.profile import measure
from lopt_pp.planning.synthetic import random_microbatch
from lopt_pp.stage.stage import Stage

MIB = 2**20
OBJECTIVES = ["none", "reconstruction", "next_token"]


@dataclass(frozen=True)
class Case:
    """Two stages of a model.

    Attributes:
        model: its name in `helpers.synthetic.FORMATS`.
        objective: of the first stage, as the flag has it.
        auxiliary_layers: likewise.
        microbatches: of an optimizer step.
        steps: to measure.
    """

    model: str
    objective: str
    auxiliary_layers: int
    microbatches: int
    steps: int

    @property
    def config(self) -> ObjectiveConfig:
        return ObjectiveConfig(local_objective=self.objective, auxiliary_layers=self.auxiliary_layers)


@dataclass(frozen=True)
class Cost:
    """Of one stage: seconds per microbatch, and the most bytes that its process held."""

    seconds: float
    peak_memory: int


def find_cut(world: World, case: Case, structure: ModelStructure, _: int) -> int:
    """The first layer of the second stage by `--split auto`."""
    transformers_logging.disable_progress_bar()
    shape, config = FORMATS[case.model], model_config(case.model)
    costs = measure(
        BlockBuilder(LlamaForCausalLM, config, structure),
        (shape.rows, shape.tokens),
        case.microbatches,
        case.config,
        OPTIM,
        StageConfig(),
        world.device,
    )
    return balance(costs, [1, 1])[1].start


def measure_stage(world: World, case: Case, structure: ModelStructure, cut: int, index: int) -> Cost:
    """Trains one of the two stages."""
    transformers_logging.disable_progress_bar()
    if world.device.type == "cpu":
        give_back_at_once()
    tracker, shape, config = MemoryTracker(world.device), FORMATS[case.model], model_config(case.model)
    imports = tracker.current()

    load = BlockBuilder(LlamaForCausalLM, config, structure).with_random_weights
    block = load(split_at([cut], config.num_hidden_layers)[index])
    objective = local_objective(block, case.config, seed=0, load=load)
    stage = Stage(block, objective, OPTIM, MANY_STEPS, device=world.device)
    batch = random_microbatch((shape.rows, shape.tokens), config.vocab_size, world.device)
    received = None if index == 0 else torch.randn(shape.rows, shape.tokens, config.hidden_size, device=world.device)
    count = case.microbatches * (stage.count(TokenCounts(batch.num_tokens, batch.num_targets)) if stage.learns else 0)

    def microbatch() -> None:
        output = stage.forward(batch, received)
        stage.outgoing(output)
        if stage.learns:
            stage.loss(output, batch, count).backward()

    computing, stepping = [], []
    for step in range(1 + case.steps):
        if step == 1:  # The first makes what the others find there.
            tracker.reset_peak()
        for _ in range(case.microbatches):
            computing.append(_seconds(world, microbatch))
        stepping.append(_seconds(world, functools.partial(stage.step, step)))
    seconds = statistics.median(computing[case.microbatches :]) + statistics.median(stepping[1:]) / case.microbatches
    return Cost(seconds, tracker.peak() - imports)


def _seconds(world: World, work: Callable[[], object]) -> float:
    begun = _now(world)
    work()
    return _now(world) - begun


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def work(world: World, job: str, *arguments: Any) -> Any:
    """One job of a worker."""
    jobs: dict[str, Callable[..., Any]] = {"cut": find_cut, "stage": measure_stage}
    return jobs[job](world, *arguments)


def in_a_fresh_process(device: str, *job: object) -> Any:
    backend: Literal["gloo", "nccl"] = "nccl" if device == "cuda" else "gloo"
    with Workers(1, ("localhost", free_port()), "lo", work, backend=backend) as workers:
        return workers.run(*job)[0]


def run(cases: Sequence[Case], device: str) -> Iterator[dict]:
    """Measures each case at both cuts."""
    for case in cases:
        structure, depth = model_structure(case.model), model_config(case.model).num_hidden_layers
        auto = in_a_fresh_process(device, "cut", case, structure, 0)
        for split, cut in (("midpoint", depth // 2), ("auto", auto)):
            stages = [in_a_fresh_process(device, "stage", case, structure, cut, index) for index in (0, 1)]
            yield {
                "case": asdict(case),
                "split": split,
                "layers": [cut, depth - cut],
                "stages": [asdict(stage) for stage in stages],
            }


def table(results: Sequence[dict]) -> str:
    """As markdown."""
    lines = ["| objective | split | cut | first ms | last ms | busiest | first MiB | last MiB |", "|---" * 8 + "|"]
    unit = max(stage["seconds"] for stage in results[0]["stages"])
    for result in results:
        first, last = result["stages"]
        busiest = max(first["seconds"], last["seconds"]) / unit
        cut = " + ".join(map(str, result["layers"]))
        times = f"{1e3 * first['seconds']:.1f} | {1e3 * last['seconds']:.1f} | {busiest:.2f}"
        memory = f"{first['peak_memory'] / MIB:.0f} | {last['peak_memory'] / MIB:.0f}"
        lines.append(f"| {result['case']['objective']} | {result['split']} | {cut} | {times} | {memory} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=FORMATS, default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("--auxiliary_layers", type=int, default=2, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--microbatches", type=int, default=4, metavar="M", help="per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="to measure (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, and less of everything")
    parser.add_argument("--output", type=Path, default=Path("objectives.json"), help="(default: %(default)s)")
    flags = parser.parse_args(arguments)
    if flags.quick:
        flags.model, flags.microbatches, flags.steps = "tiny", 2, 2
    device = torch.device(flags.device)
    if (reason := reason_not_possible(device)) is not None:
        print(f"skipped: {reason}")
        return 0
    machine = describe_machine(device)
    sizes = flags.auxiliary_layers, flags.microbatches, flags.steps
    results = list(run([Case(flags.model, objective, *sizes) for objective in OBJECTIVES], flags.device))
    print(table(results))
    print(f"\n{one_line(machine)}")
    flags.output.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a process holds of main memory, at most, while it loads its stage, saves a checkpoint and resumes from one.

    python -m benchmarks.memory.host [--replicas 1 4] [--quick] [--output host.json]

The last of two stages of a random model of the Llama architecture, whose files are in bfloat16, in fresh processes on
CPUs: one, or several replicas of it, with and without sharding. All is in float32, with AdamW's state (12 bytes a
parameter). On a CPU the stage itself stays in main memory; on a GPU it does not, and only what is above it is left.
Columns, in bytes a parameter of the whole stage, in the process with the most:

  load, stays      what the process holds once its stage is loaded, less what it held before.
  load, above      the most that loading takes above that.
  save, writer     the most that a save takes above what is held between two steps, in the replica that writes.
  save, others     the same in the others.
  resume, stays    what the process holds once it has resumed, less what it held before it had a stage.
  resume, above    the most that resuming takes above that.

A last column has the largest tensor of the stage in the same unit: loading and resuming are to take no more than 1.2
times that above what stays, and a save one copy of the state (12) in the writer.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.helpers.machine import describe_machine, one_line
from benchmarks.helpers.process_memory import MemoryTracker, give_back_at_once, reason_not_possible
from benchmarks.helpers.synthetic import MANY_STEPS, OPTIM, SMALL
from benchmarks.helpers.workers import Workers, free_port
from lopt_pp.checkpoint.manifest import Manifest, Part
from lopt_pp.checkpoint.resume import Start
from lopt_pp.checkpoint.writer import PartWriter
from lopt_pp.distributed.world import World
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.stage.stage import Stage

SHAPE: dict[str, Any] = SMALL | {"vocab_size": 16384, "hidden_size": 640, "intermediate_size": 1728}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """How many processes hold the stage, and whether each has a shard of it."""

    replicas: int
    sharded: bool


@dataclass(frozen=True)
class HostMemory:
    """Of one process, in bytes; see the columns above.

    Attributes:
        parameters: their number, in the whole stage.
        largest: of its tensors, in float32.
    """

    parameters: int
    largest: int
    load_stays: int
    load_above: int
    save_above: int
    resume_stays: int
    resume_above: int


def cases(replicas: Sequence[int]) -> list[Case]:
    return [Case(number, sharded) for number in replicas for sharded in ((False, True) if number > 1 else (False,))]


def measure(world: World, case: Case, model: Path, directory: Path) -> HostMemory:
    """Loads, saves and resumes this process's stage, together with its replicas."""
    transformers_logging.disable_progress_bar()
    give_back_at_once()
    tracker = MemoryTracker(_CPU)
    replicas = None
    if case.replicas > 1:
        replicas = Replicas(init_device_mesh("cpu", (case.replicas,)), sharded=case.sharded)
    config = LlamaConfig.from_pretrained(model)
    specs = split_evenly(config.num_hidden_layers, 2)
    builder, weights = (
        BlockBuilder(LlamaForCausalLM, config, check_split(LlamaForCausalLM, config, specs)),
        PretrainedWeights(str(model)),
    )
    builder.whole  # noqa: B018  Made once, before anything is measured.

    def load() -> Stage:
        keep = replicas.keep if replicas is not None and case.sharded else None
        block = builder.from_pretrained(specs[1], weights, _CPU, keep)
        objective = local_objective(block, ObjectiveConfig(), seed=0)
        return Stage(block, objective, OPTIM, MANY_STEPS, device=_CPU, replicas=replicas)

    before = tracker.current()
    tracker.reset_peak()
    stage = load()
    load_peak, load_stays = tracker.peak(), tracker.current()
    assert stage.optimizer is not None
    for parameter in stage.optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    stage.optimizer.step()
    numbers = [parameter.numel() for parameter in stage.optimizer.parameters]

    held = tracker.current()
    tracker.reset_peak()
    writer = PartWriter(directory, dist.HashStore(), 2, is_writer=world.rank == 0)
    writer.save([stage], 1)
    writer.finish()
    save_above = tracker.peak() - held
    world.barrier("saved")

    del stage, parameter
    gc.collect()
    before_resume = tracker.current()
    stage = load()
    manifest = Manifest(directory / "checkpoint-1.unfinished", 1, tuple(specs), {}, (Part(0, ""), Part(0, "")))
    tracker.reset_peak()
    Start("", manifest).load([stage], specs)
    resume_peak, resume_stays = tracker.peak(), tracker.current()
    return HostMemory(
        parameters=sum(numbers),
        largest=4 * max(numbers),
        load_stays=load_stays - before,
        load_above=max(0, load_peak - load_stays),
        save_above=save_above,
        resume_stays=resume_stays - before_resume,
        resume_above=max(0, resume_peak - resume_stays),
    )


def run(case: Case, model: Path) -> list[HostMemory]:
    """Measures one case in fresh processes."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Workers(case.replicas, ("localhost", free_port()), "lo", measure) as workers,
    ):
        return workers.run(case, model, Path(scratch))


def table(results: Sequence[tuple[Case, list[HostMemory]]]) -> list[str]:
    """The lines of a table in Markdown; the columns are explained above."""
    lines = [
        "| replicas | sharding | load, stays | above | save, writer | others | resume, stays | above | largest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, memory in results:
        number, others = memory[0].parameters, [own.save_above for own in memory[1:]]
        figures = [
            max(own.load_stays for own in memory),
            max(own.load_above for own in memory),
            memory[0].save_above,
            max(others) if others else None,
            max(own.resume_stays for own in memory),
            max(own.resume_above for own in memory),
            memory[0].largest,
        ]
        shown = " | ".join("" if figure is None else f"{figure / number:.2f}" for figure in figures)
        lines.append(f"| {case.replicas} | {'full' if case.sharded else 'none'} | {shown} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 4], help="of the stage (default: 1 4)")
    parser.add_argument("--quick", action="store_true", help="a smaller model, and 2 replicas at most")
    parser.add_argument("--output", type=Path, default=Path("host.json"), help="(default: %(default)s)")
    flags = parser.parse_args()
    if (reason := reason_not_possible(_CPU)) is not None:
        print(f"nothing is measured: {reason}")
        return 1
    shape = {**SHAPE, **({"hidden_size": 256, "intermediate_size": 704} if flags.quick else {})}
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(0)
        config = LlamaConfig(**shape, tie_word_embeddings=False)
        LlamaForCausalLM(config).bfloat16().save_pretrained(scratch)
        for case in cases([1, 2] if flags.quick else flags.replicas):
            results.append((case, run(case, Path(scratch))))
    facts = describe_machine(_CPU)
    print("\n".join(table(results)))
    print(one_line(facts))
    kept = [asdict(case) | {"processes": [asdict(own) for own in memory]} for case, memory in results]
    result = {"benchmark": "host memory", "machine": facts, "shape": shape, "cases": kept}
    flags.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a process holds in memory: its part of the model, and the activations at work in it.

    python -m benchmarks.memory.training [--quick] [--device cuda] [--models ...] [--output memory.json]

Layouts: LoPT-PP with its stages in as many processes or all in one; the 1F1B and GPipe schedules of
torch.distributed.pipelining, which train the same blocks end to end; the whole model end to end in one process. Each
measurement has fresh processes, forked when PyTorch has been imported. It is of resident memory on CPUs, where it takes
Linux and glibc, and of what PyTorch has allocated on GPUs. Columns, in MiB:

  M            microbatches per optimizer step.
  peak         the most that training takes.
  imports      a process that has only imported the program, as far as its pages are in use.
  model        the weights, gradients and AdamW's state, as tensors count them.
  other        what is there besides these two between two steps with gradients kept: libraries, communication.
  activations  what the steps add to the three, at most: of the microbatch at work, or of the several that a schedule
               has at work at once, and the queue. Every microbatch adds its gradients to those that are there. With
               M = 1 training has none there when a microbatch begins, and its peak is lower than the sum.
  queue        of that, messages that wait at the process's boundaries when these are full, by count.
  saved        the most bytes that autograd keeps for backward, parameters aside: exact, by hooks. Not in it are what
               operators need for a moment, and the output head's gradient, which its chunked loss makes in forward.

A stage never holds the activations of more than one microbatch: without the queue they are to be the same with any
number of microbatches per step and any queue depth, and no more with more stages. Resident memory may differ by
--margin of them, and by --slack.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, get_args

# Before PyTorch: one thread in each process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.helpers.machine import describe_machine, one_line
from benchmarks.helpers.process_memory import reason_not_possible
from benchmarks.helpers.synthetic import FORMATS, model_structure
from benchmarks.helpers.workers import Workers, free_port
from benchmarks.memory.claims import (
    MIB,
    Results,
    claims_of,
    claims_table,
    comparison_table,
    growth_table,
    savings_table,
)
from benchmarks.memory.layouts import Case, ProcessMemory, measure
from lopt_pp.distributed.world import World
from lopt_pp.model.structure import ModelStructure

SIDE_BY_SIDE = 2
"""Cases of one process each that are measured at the same time."""

Dtype = Literal["float32", "bfloat16", "pure_bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


def comparison(model: str, microbatches: Sequence[int]) -> Iterator[Case]:
    """Every layout with every number of microbatches; in one process, which takes longest, with the ends of them."""
    for number in microbatches:
        yield Case(model, "LoPT-PP", 2, 2, number)
        yield Case(model, "1F1B", 2, 2, number)
        yield Case(model, "GPipe", 2, 2, number)
        if number in ends_of(microbatches):
            for stages in (1, 2, 4):
                yield Case(model, "LoPT-PP", stages, 1, number)


def growth(model: str, stages: Iterable[int], microbatches: Sequence[int], depths: Iterable[int]) -> Iterator[Case]:
    """This project's with more of everything."""
    for k in stages:
        for number in ends_of(microbatches):
            yield Case(model, "LoPT-PP", k, 1, number)
            for depth in depths:
                yield Case(model, "LoPT-PP", k, k, number, depth)


def ends_of(numbers: Sequence[int]) -> list[int]:
    """The least and the most."""
    return sorted({min(numbers), max(numbers)})


def savings(model: str, dtypes: Iterable[Dtype]) -> Iterator[Case]:
    """What a dtype and checkpointing change, with both stages in one process."""
    plain = Case(model, "LoPT-PP", 2, 1, 1)
    for dtype in dtypes:
        for checkpointing in (False, True):
            yield replace(plain, dtype=dtype, gradient_checkpointing=checkpointing)


def work(world: World, cases: Sequence[Case], structure: Mapping[str, ModelStructure]) -> ProcessMemory:
    """One process's part: of the one case, or of its own where each has one to itself."""
    case = cases[world.rank] if len(cases) > 1 else cases[0]
    return measure(world, case, structure[case.model])


def rounds(cases: Iterable[Case], side_by_side: int) -> Iterator[list[Case]]:
    """The cases in an order to run them in: those of one process some at a time, which changes nothing for them."""
    alone = []
    for case in cases:
        if case.processes > 1:
            yield [case]
            continue
        alone.append(case)
        if len(alone) == side_by_side:
            yield alone
            alone = []
    if alone:
        yield alone


def prepare(rank: int, pipe: Connection) -> None:
    """Lets several workers share a GPU."""
    if torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
        # NCCL refuses two ranks on one GPU of one host; with another name each passes for a host of its own.
        os.environ["NCCL_HOSTID"] = f"rank-{rank}"


def run(cases: Sequence[Case], structure: Mapping[str, ModelStructure], device: str) -> Results:
    """Measures one round of cases in fresh processes."""
    number = sum(case.processes for case in cases)
    backend: Literal["gloo", "nccl"] = "nccl" if device == "cuda" else "gloo"
    with Workers(number, ("localhost", free_port()), "lo", work, prepare, backend) as workers:
        memory = workers.run(cases, structure)
    if len(cases) == 1:
        return {cases[0]: memory}
    return {case: [own] for case, own in zip(cases, memory, strict=True)}


def expected(cases: Sequence[Case], results: Results) -> int:
    """Bytes that the cases will take, by the same layouts with one microbatch per step; 0 where that is not known."""

    def of(case: Case) -> int:
        at_once = {"LoPT-PP": 1, "1F1B": min(case.microbatches, case.stages), "GPipe": case.microbatches}[case.method]
        known = results.get(replace(case, microbatches=1), [])
        return sum(memory.fixed + at_once * memory.activations for memory in known)

    return sum(map(of, cases))


def to_spare() -> int:
    """Bytes of memory that this machine has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=FORMATS, default=["smollm2-135m", "small"], help="to compare on")
    parser.add_argument("--microbatches", nargs="+", type=int, default=[1, 4, 8], metavar="M", help="per step")
    parser.add_argument("--growing", choices=FORMATS, default="small", help="model for the tables of growth")
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8], metavar="K", help="of these tables")
    parser.add_argument("--queue_depths", nargs="+", type=int, default=[1, 2, 8], metavar="N", help="of these tables")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help="of the table of savings")
    parser.add_argument("--margin", type=float, default=0.05, help="(default: %(default)s)")
    parser.add_argument("--slack", type=float, default=1, help="in MiB (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a GPU each, or one for all")
    parser.add_argument("--quick", action="store_true", help="the small model on short rows, and less of everything")
    parser.add_argument("--output", type=Path, default=Path("memory.json"), help="(default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.models, parsed.microbatches, parsed.growing = ["short"], [1, 8], "short"
        parsed.stages, parsed.queue_depths = [2, 4], [2, 4]
        parsed.dtypes = ["bfloat16"]
    return parsed


def main() -> int:
    flags = parse(sys.argv[1:])
    if (reason := reason_not_possible(torch.device(flags.device))) is not None:
        print(f"nothing is measured: {reason}")
        return 1
    facts = describe_machine(torch.device("cpu"))
    compared = {model: list(comparison(model, flags.microbatches)) for model in flags.models}
    grown = list(growth(flags.growing, flags.stages, flags.microbatches, flags.queue_depths))
    saved = list(savings(flags.models[0], flags.dtypes))
    cases = list(dict.fromkeys([case for cases in compared.values() for case in cases] + grown + saved))
    structure = {model: model_structure(model) for model in {case.model for case in cases}}

    results: Results = {}
    left_out: dict[Case, str] = {}
    begun = time.perf_counter()
    # In the order of M, so that what one microbatch takes is known before there are many.
    for together in rounds(sorted(cases, key=lambda case: case.microbatches), side_by_side=SIDE_BY_SIDE):
        needed = expected(together, results)
        if flags.device == "cpu" and needed > 0.8 * to_spare():
            for case in together:
                left_out[case] = f"it takes about {needed / MIB:.0f} MiB, of which the machine has too little left"
            continue
        results |= run(together, structure, flags.device)
        for case in together:
            seconds = time.perf_counter() - begun
            print(f"{seconds:4.0f} s: {case.model}, {case.layout}, M={case.microbatches}", file=sys.stderr, flush=True)

    claims = claims_of(results, flags.margin, flags.slack * MIB)
    for model, own in compared.items():
        shape = FORMATS[model]
        print(f"\n{model}, {shape.rows} x {shape.tokens} tokens in a microbatch; MiB")
        print("\n".join(comparison_table(own, results)))
    print(f"\n{flags.growing}, LoPT-PP with more of everything: the process with the most at work; MiB")
    print("\n".join(growth_table(grown, results)))
    print(f"\n{flags.models[0]}, both stages in one process, M=1; MiB")
    print("\n".join(savings_table(saved, results)))
    print()
    print("\n".join(claims_table(claims)))
    for case, reason in left_out.items():
        print(f"left out: {case.model}, {case.layout}, M={case.microbatches}: {reason}")
    facts |= {"device": flags.device, "seconds": round(time.perf_counter() - begun)}
    if flags.device == "cuda":  # Asked only now: processes cannot be forked from one that has used a GPU.
        facts["gpu"] = torch.cuda.get_device_name()
    print(one_line(facts))

    result = {
        "benchmark": "memory",
        "command": " ".join(["python", "-m", "benchmarks.memory.training", *sys.argv[1:]]),
        "machine": facts,
        "settings": {**vars(flags), "output": str(flags.output)},
        "shapes": {model: asdict(FORMATS[model]) for model in structure},
        "cases": [
            asdict(case)
            | {
                "layout": case.layout,
                "processes_hold": [
                    asdict(memory) | {"model": memory.model, "other": memory.other, "at_work": memory.at_work}
                    for memory in own
                ],
            }
            for case, own in results.items()
        ],
        "left_out": [asdict(case) | {"reason": reason} for case, reason in left_out.items()],
        "claims": [asdict(claim) | {"holds": claim.holds} for claim in claims],
    }
    flags.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

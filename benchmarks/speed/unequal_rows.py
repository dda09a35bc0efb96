"""Measures 1F1B against local learning where rows are of unequal lengths, on two processes of one thread each.

    python -m benchmarks.speed.unequal_rows [--quick] [--microbatches ...] [--rounds N] [--output unequal_rows.json]

The rows are as long as rows of GSM8K (lengths of gsm8k_lengths.json, random tokens, a loss on the answers' share), two
to a microbatch, and once more packed (`--packing`, `--max_length 512`), one pack to a microbatch. Ways to train:

  alike           PyTorch's 1F1B, as `--method e2e` runs it: all microbatches of a step are padded to one shape.
  own shapes      1F1B in which each microbatch has the shape of its own rows, as by Megatron-LM's variable lengths.
  reconstruction  local learning with the paper's objective.
  next_token      local learning by a network of all layers that follow, from half (--learned) of the microbatches.
  frozen          the first half only runs forward.

They take turns in short trials on the same rows, other rows in each round; a ratio is of trials of one round, and of
the rounds the median counts. End to end and reconstruction have the best of three cuts from the middle on, next_token
and frozen the middle, since there the cut says what is learned. Tokens are real ones: padding does not count.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

# Before PyTorch: one thread in each process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.helpers import machine
from benchmarks.helpers.synthetic import FORMATS
from benchmarks.helpers.workers import Workers, free_port
from benchmarks.speed.shared_model import PROCESSES
from benchmarks.speed.unequal_rows_process import METHODS, Settings, work

FAIR = "own shapes"


def measure(settings: Settings) -> dict[str, Any]:
    """All trials; see `unequal_rows_process.work`."""
    with Workers(PROCESSES, ("localhost", free_port()), "lo", work) as workers:
        workers.run(settings)
    return summarize(settings.output)


def summarize(output: Path) -> dict[str, Any]:
    """What was measured so far, with the figures of the table."""
    measured = json.loads(output.read_text())
    for cell in measured["cells"]:
        seconds = cell["seconds"]
        cell["tokens_per_second"] = {
            name: median(tokens / own for tokens, own in zip(cell["tokens"], seconds[name], strict=True))
            for name in seconds
        }
        cell["over_own_shapes"] = {
            name: median(fair / own for fair, own in zip(seconds[FAIR], seconds[name], strict=True)) for name in seconds
        }
    return measured


def table(cells: list[dict[str, Any]]) -> list[str]:
    """As markdown: the speed of 1F1B with own shapes, and how many times as fast the others are."""
    heads = [
        "rows",
        "M",
        "padded, own shapes",
        "padded alike",
        "own shapes, tokens/s",
        *(m for m in METHODS if m != FAIR),
    ]
    lines = [heads, ["---"] * len(heads)]
    for cell in cells:
        over = cell["over_own_shapes"]
        lines.append(
            [
                "packed" if cell["packing"] else "one by one",
                str(cell["microbatches"]),
                f"{median(cell['computed_own']):.2f}",
                f"{median(cell['computed_alike']):.2f}",
                f"{cell['tokens_per_second'][FAIR]:.0f}",
                *(f"{over[name]:.2f}" for name in METHODS if name != FAIR),
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8, 16], metavar="M", help="per step")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--trial", type=int, default=16, metavar="N", help="microbatches at least (default: %(default)s)"
    )
    parser.add_argument("--model", choices=FORMATS, default="medium", help="its shapes (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="of a microbatch without packing (default: %(default)s)")
    parser.add_argument("--cut", type=int, help="end to end and reconstruction, instead of a search")
    parser.add_argument("--learned", type=float, default=0.5, help="share for next_token (default: %(default)s)")
    parser.add_argument("--no_packing", action="store_true", help="only rows one by one")
    parser.add_argument("--quick", action="store_true", help="only see that it works: a tiny model, 2 microbatches")
    parser.add_argument("--output", type=Path, default=Path("unequal_rows.json"), help="(default: %(default)s)")
    flags = parser.parse_args()
    if flags.quick:
        flags.model, flags.microbatches, flags.rounds, flags.trial = "tiny", [2], 1, 2
    settings = Settings(
        flags.model,
        flags.rows,
        tuple(flags.microbatches),
        (False,) if flags.no_packing else (False, True),
        flags.rounds,
        flags.trial,
        flags.learned,
        flags.cut,
        flags.output,
    )
    facts = machine.describe_machine(torch.device("cpu"))
    result = measure(settings)
    print("\n".join(table(result["cells"])))
    print(f"padded: tokens computed for each real one; first layers of the second half: {result['cuts']}")
    print(machine.one_line(facts))
    command = " ".join(["python", "-m", "benchmarks.speed.unequal_rows", *sys.argv[1:]])
    flags.output.write_text(json.dumps({"command": command, "machine": facts, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()

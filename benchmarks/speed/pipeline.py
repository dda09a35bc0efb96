"""Measures a pipeline of two processes, one thread each, against what a user would take instead.

    python -m benchmarks.speed.pipeline [--quick] [--device cuda] [--models ...] [--microbatches ...] [--methods ...]

Real compute: this project's stages, stream and loop against the schedules of torch.distributed.pipelining, both halves
of the model in turn, and data parallelism. All have the same model, microbatches, loss and AdamW; each has the split
that a search has found best for it. Methods take turns in short trials, round after round, so that a machine that
changes its speed favours nobody, and every ratio is of trials of one round; of rounds the median counts.

Prints a table and the figures that are to be reached, and writes both, with every trial, to --output.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

MODELS = ("smollm2-135m", "small", "tiny")
METHODS = ("lopt", "1f1b", "gpipe", "zero_bubble", "zbv", "naive", "ddp")
PROCESSES = 2


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2-135m", "small"])
    parser.add_argument("--microbatches", nargs="+", type=int, default=[1, 2, 4, 8], help="per optimizer step")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="LoPT-PP (lopt) always runs"
    )
    parser.add_argument("--minutes", type=float, default=17, help="no round begins that would last longer; but two do")
    parser.add_argument("--rounds", type=int, help="exactly so many, whatever --minutes says")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: a GPU each, or one for both")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--quick", action="store_true", help="only see that it works: a tiny model, no search")
    parser.add_argument("--output", type=Path, default=Path("pipeline.json"))
    parsed = parser.parse_args(arguments)
    if parsed.quick:
        parsed.models, parsed.microbatches, parsed.rounds = ["tiny"], [1, 2], 2
    parsed.methods = ["lopt", *(method for method in parsed.methods if method != "lopt")]
    return parsed


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    arguments = parse(words)
    if "RANK" in os.environ:
        # Here, since the process that starts the others needs nothing of it, and it takes seconds to import.
        from benchmarks.speed.pipeline_process import run

        run(arguments)
        return 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp"]
    launcher += ["--nproc-per-node", str(PROCESSES), "-m", "benchmarks.speed.pipeline"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
    return subprocess.run([*launcher, *words], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())

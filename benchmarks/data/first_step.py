"""Measures how long a run waits for its data: the time to the first step on a file of many rows.

    python -m benchmarks.data.first_step [--rows 400000] [--output first_step.json]

Runs the trainer as a user does, in two processes and for one step, on a model so small that next to nothing but the
data takes time: with all rows tokenized before (once anew, once from the cache), with --packing, and with --streaming;
and on a file of 1,000 rows, for what a start takes anyway. The rows are questions and answers of 20 to 200 words,
rendered by a chat template. Per case: seconds of the whole program, by the clock and of its processors (of all its
processes together, which tells the same on a machine that has other things to do).
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.helpers.chat_model import write_chat_model
from benchmarks.helpers.machine import describe_machine, one_line

CASES = {
    "1,000 rows": ("few", ""),
    "--streaming": ("many", "--streaming"),
    "--streaming --packing": ("many", "--streaming --packing"),
    "all tokenized before": ("many", ""),
    "the same, from the cache": ("many", ""),
    "--packing, from the cache": ("many", "--packing"),
}


def lines(number: int) -> Iterable[str]:
    """Rows of random words, as JSON."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(draw.choices(words, k=draw.randint(10, 100))) for _ in range(2000)]
    for place in range(number):
        row = {"question": f"{place} {draw.choice(texts)}", "answer": draw.choice(texts)}
        yield json.dumps(row) + "\n"


def seconds(flags: list[str], cache: Path) -> tuple[float, float]:
    """Of a run of one step, from its start to its end: by the clock, and of its processors."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache)}
    begun, used = time.perf_counter(), _processor_seconds()
    subprocess.run([*launcher, "-m", "lopt_pp.train", *flags], env=environment, check=True, capture_output=True)
    return time.perf_counter() - begun, _processor_seconds() - used


def _processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--output", type=Path, default=Path("first_step.json"))
    arguments = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_chat_model(folder / "model", lines(2000))
        for name, number in (("few", 1000), ("many", arguments.rows)):
            with (folder / f"{name}.jsonl").open("w") as file:
                file.writelines(lines(number))
        size = (folder / "many.jsonl").stat().st_size
        taken = {}
        for number, (case, (rows, more)) in enumerate(CASES.items()):
            flags = (
                f"--model_name_or_path {model} --train_file {folder / rows}.jsonl --output_dir {folder / str(number)}"
            )
            flags += f" --max_steps 1 --save_steps 0 --max_length 1024 {more}"
            taken[case] = seconds(flags.split(), folder / "cache")
            clock, processors = taken[case]
            print(f"{case:<28} {clock:>8.1f} s {processors:>8.1f} s of processors", flush=True)
    print(f"{arguments.rows} rows, {size / 2**20:.0f} MiB; {one_line(machine)}")
    result = {"rows": arguments.rows, "bytes": size, "seconds": taken, "machine": machine}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

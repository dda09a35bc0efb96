"""Runs the trainer as a user does, in two processes and in one, and measures the whole program.

    python -m benchmarks.speed.trainer [--model DIRECTORY] [--output trainer.json]

Per run and stage: tokens per second, the share of wall time spent computing (without the first steps), and the peak
memory of the process; beside them the peak of a process that only loads the whole model. Without --model it makes one
with the shapes of SmolLM2-135M and random weights. Rows are random tokens, all of --max_length.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.helpers.synthetic import write_model, write_rows

LOAD_WHOLE = """
import sys, torch
from transformers import AutoModelForCausalLM
import lopt_pp.train
from lopt_pp.metrics import peak_memory
if sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    for parameter in model.parameters():
        parameter.sum()  # A mapped file is resident where it has been read.
print(peak_memory(torch.device("cpu")))
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}


def python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], env=environment(), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def measure(processes: int, flags: list[str], output: Path, skip: int) -> list[dict[str, Any]]:
    """One run; by stage, its figures over the steps after the first `skip`."""
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp", "--nproc-per-node", str(processes)]
    python(*launcher, "-m", "lopt_pp.train", *flags, "--output_dir", str(output))
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    figures = []
    for stage in sorted({record["stage"] for record in records}):
        own = [record for record in records if record["stage"] == stage and record["step"] > skip]
        wall = sum(record["step_seconds"] for record in own)
        computing = sum(record[f"{phase}_seconds"] for record in own for phase in ("forward", "backward", "optimizer"))
        figures.append(
            {
                "processes": processes,
                "stage": stage,
                "tokens_per_second": sum(record["num_tokens"] for record in own) / wall,
                "computing": computing / wall,
                "waiting_to_receive": sum(record["wait_receive_seconds"] for record in own) / wall,
                "waiting_to_send": sum(record["wait_send_seconds"] for record in own) / wall,
                "peak_memory_mib": max(record["peak_memory_bytes"] for record in records if record["stage"] == stage)
                / 2**20,
            }
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: the shapes of SmolLM2-135M)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=5, help="first steps that do not count")
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("trainer.json"))
    arguments, others = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = arguments.model or write_model(folder / "model")
        number = arguments.steps * arguments.per_device_train_batch_size
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        rows = write_rows(folder / "rows.jsonl", vocabulary, arguments.max_length, number)
        flags = f"--model_name_or_path {model} --train_file {rows} --max_steps {arguments.steps} --save_steps 0"
        flags += f" --max_length {arguments.max_length}"
        flags += f" --per_device_train_batch_size {arguments.per_device_train_batch_size}"
        runs = [
            figures
            for processes in (2, 1)
            for figures in measure(processes, [*flags.split(), *others], folder / str(processes), arguments.skip)
        ]
        imports = int(python("-c", LOAD_WHOLE)) / 2**20
        whole = int(python("-c", LOAD_WHOLE, str(model))) / 2**20

    print(
        f"{'processes':>9} {'stage':>5} {'tokens/s':>9} {'computing':>9} {'receiving':>9} {'sending':>8} "
        f"{'peak MiB':>9}"
    )
    for run in runs:
        print(
            f"{run['processes']:>9} {run['stage']:>5} {run['tokens_per_second']:>9.1f} {run['computing']:>9.1%} "
            f"{run['waiting_to_receive']:>9.1%} {run['waiting_to_send']:>8.1%} {run['peak_memory_mib']:>9.0f}"
        )
    print(f"a process that imports the program: {imports:.0f} MiB; that also loads the whole model: {whole:.0f} MiB")
    result = {"runs": runs, "imports_mib": imports, "whole_model_mib": whole, "torch": torch.__version__}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measures what a checkpoint costs the training that it is made of.

    python -m benchmarks.speed.checkpoints [--model DIRECTORY] [--save_steps 8] [--rounds 3] [--output saving.json]

Two stages in two processes of one thread, as a user starts them, in turn with checkpoints and without, round after
round. Per stage, from the records of the steps:

  step     the median step of the runs without checkpoints
  pause    how much longer the step takes that follows a save: the state is copied before training goes on
  cost     how much longer all steps of the run take, per save: also what the writing in the background takes from cores
           and memory that the training would use

Prints a table and writes it to --output. Without --model it makes one with the shapes of SmolLM2-135M.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.helpers.machine import describe_machine, one_line
from benchmarks.helpers.synthetic import write_model, write_rows
from benchmarks.speed.trainer import python

SKIP = 4
"""First steps, which do not count."""

Records = list[dict[str, Any]]


def run(flags: list[str], output: Path) -> Records:
    launcher = [
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        "lopt-pp",
        "--nproc-per-node",
        "2",
        "-m",
        "lopt_pp.train",
    ]
    python(*launcher, *flags, "--output_dir", str(output))
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def steps_of(records: Records, stage: int) -> dict[int, float]:
    """By step, the seconds that a stage took."""
    own = [record for record in records if record["stage"] == stage and record["step"] > SKIP]
    return {record["step"]: record["step_seconds"] for record in own}


def figures_of(stage: int, without: list[Records], saving: list[Records], save_steps: int) -> dict[str, float]:
    plain = [steps_of(records, stage) for records in without]
    step = median(seconds for steps in plain for seconds in steps.values())
    pauses, costs = [], []
    for steps, own in zip(plain, (steps_of(records, stage) for records in saving), strict=True):
        after = [number for number in own if number % save_steps == 1]
        pauses += [own[number] - step for number in after]
        costs.append((sum(own.values()) - sum(steps.values())) / len(after))
    return {"stage": stage, "step_seconds": step, "pause_seconds": median(pauses), "cost_seconds": median(costs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: the shapes of SmolLM2-135M)")
    parser.add_argument("--save_steps", type=int, default=8)
    parser.add_argument("--saves", type=int, default=3, help="in a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per_device_train_batch_size", type=int, default=2)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("saving.json"))
    given = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))
    steps = given.save_steps * (given.saves + 1)
    without, saving, size = [], [], 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = given.model or write_model(folder / "model")
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        number = steps * given.per_device_train_batch_size * given.gradient_accumulation_steps
        rows = write_rows(folder / "rows.jsonl", vocabulary, given.max_length, number)
        flags = f"--model_name_or_path {model} --train_file {rows} --max_length {given.max_length} --max_steps {steps}"
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            flags += f" --{name} {getattr(given, name)}"
        flags += " --save_total_limit 1"
        for turn in range(given.rounds):
            without.append(run([*flags.split(), "--save_steps", "0"], folder / f"without-{turn}"))
            out = folder / f"saving-{turn}"
            saving.append(run([*flags.split(), "--save_steps", str(given.save_steps)], out))
            size = sum(file.stat().st_size for file in out.glob("checkpoint-*/stage-*"))
    stages = [figures_of(stage, without, saving, given.save_steps) for stage in (0, 1)]
    print("| stage | step | pause after a save | of a step | cost of a save | of a step |")
    print("|---|---|---|---|---|---|")
    for own in stages:
        step, pause, cost = (own[f"{name}_seconds"] for name in ("step", "pause", "cost"))
        shown = f"{pause:.2f} s | {pause / step:.2f} | {cost:.2f} s | {cost / step:.2f}"
        print(f"| {own['stage']:.0f} | {step:.2f} s | {shown} |")
    print(f"a checkpoint has {size / 2**20:.0f} MiB; {one_line(machine)}")
    result = {"stages": stages, "checkpoint_bytes": size, "save_steps": given.save_steps, "machine": machine}
    given.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

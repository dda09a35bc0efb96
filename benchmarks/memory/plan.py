"""What `lopt-pp plan` says a process holds, and what it holds in a run of the whole program.

    python -m benchmarks.memory.plan [--models llama qwen3 gpt_neox] [--thorough] [--output plan.json]

Models of about 100 to 200 million parameters with random weights are trained by `lopt_pp.train` on the CPU: as two
stages in two processes and in one, end to end in one process and as a 1F1B pipeline of two. Columns, in MiB:

  planned    what the plan says that the process holds at its fullest moment.
  measured   the peak of its resident memory in training, as `metrics.jsonl` has it, less `imports`.
  ratio      planned / measured. To reach: 0.9 to 1.1.
  state      of both: weights and AdamW's moments, which anything can count.
  the rest   planned / measured of what is not state: activations, gradients, queues; and of the measured the libraries'
             own memory, which no plan knows.

glibc is told to give freed memory back at once (its environment variables are in the result); by default it keeps some.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from benchmarks.helpers.machine import describe_machine, one_line
from benchmarks.helpers.synthetic import SMOLLM2_135M, write_model, write_rows
from lopt_pp.config.compute import StageConfig
from lopt_pp.config.model import ModelConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.plan import PlanConfig
from lopt_pp.objectives import ObjectiveConfig
from lopt_pp.planning.plan import plan

MIB = 2**20
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("SmolLM2-135M", {**SMOLLM2_135M}),
    "qwen3": (
        "like Qwen3, smaller",
        {
            "vocab_size": 65536,
            "hidden_size": 640,
            "intermediate_size": 1920,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox": (
        "Pythia-160M",
        {
            "vocab_size": 50304,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
        },
    ),
}
"""By model type: the model whose shapes these are, and the values of its config."""

GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
IMPORTS = """
import torch
import lopt_pp.train
from lopt_pp.metrics import peak_memory
print(peak_memory(torch.device("cpu")))
"""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        model: its type, in `MODELS`.
        method: as the flag has it.
        processes: that hold the two stages, or with `e2e` the model.
        accumulation: microbatches of a step.
        dtype: of the computation.
        gradient_checkpointing: as the flag has it.
    """

    model: str
    method: str
    processes: int
    accumulation: int
    dtype: str = "float32"
    gradient_checkpointing: bool = False

    @property
    def layout(self) -> str:
        processes = "1 process" if self.processes == 1 else f"{self.processes} processes"
        if self.method == "e2e":
            return f"end to end, {processes}" if self.processes == 1 else f"1F1B, {processes}"
        return f"LoPT-PP, {processes}"


def cases(model: str, thorough: bool) -> Iterator[Case]:
    """Every layout; if thorough, also what changes the activations."""
    yield Case(model, "lopt", 2, 2)
    yield Case(model, "lopt", 1, 1)
    yield Case(model, "e2e", 1, 2)
    yield Case(model, "e2e", 2, 3)
    if thorough:
        yield Case(model, "lopt", 2, 1)
        yield Case(model, "lopt", 2, 8)
        yield Case(model, "lopt", 2, 2, gradient_checkpointing=True)
        yield Case(model, "lopt", 2, 2, dtype="bfloat16")


def python(*arguments: str) -> str:
    environment = os.environ | GIVE_BACK | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def measure(case: Case, model: Path, rows: Path, flags: argparse.Namespace, output: Path) -> list[int]:
    """Trains for as many steps as fill the queues; returns the peak of each process, in bytes."""
    given = f"--model_name_or_path {model} --train_file {rows} --output_dir {output} --method {case.method}"
    given += f" --num_stages 2 --max_steps {max(2, 4 // case.accumulation)} --max_length {flags.max_length}"
    given += " --save_steps 0"
    given += f" --per_device_train_batch_size {flags.rows} --gradient_accumulation_steps {case.accumulation}"
    given += f" --dtype {case.dtype} --gradient_checkpointing {case.gradient_checkpointing}"
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp", "--nproc-per-node", str(case.processes)]
    python(*launcher, "-m", "lopt_pp.train", *given.split())
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    peaks = [
        max(record["peak_memory_bytes"] for record in records if record["stage"] == stage)
        for stage in sorted({record["stage"] for record in records})
    ]
    return peaks[: case.processes]


def planned(case: Case, model: Path, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """What the plan says of each process."""
    result = plan(
        ModelConfig(str(model)),
        PipelineConfig(pipeline_processes=case.processes),
        ObjectiveConfig(),
        OptimConfig(),
        StageConfig(dtype=case.dtype, gradient_checkpointing=case.gradient_checkpointing),  # type: ignore[arg-type]
        PlanConfig(
            per_device_train_batch_size=flags.rows,
            gradient_accumulation_steps=case.accumulation,
            max_length=flags.max_length,
            device="cpu",
        ),
    )
    if case.method == "lopt":
        return result["processes"]
    end_to_end = result["end_to_end"]
    return [end_to_end["one_process"]] if case.processes == 1 else end_to_end["pipeline"]


def compare(
    case: Case, model: Path, rows: Path, flags: argparse.Namespace, output: Path, imports: int
) -> list[dict[str, Any]]:
    """One entry for each process of a case, in bytes."""
    entries = []
    for position, (own, peak) in enumerate(
        zip(planned(case, model, flags), measure(case, model, rows, flags, output), strict=True)
    ):
        state = own["memory"]["weights"] + own["memory"]["optimizer"]
        measured = peak - imports
        entries.append(
            asdict(case)
            | {
                "layout": case.layout,
                "process": position,
                "planned": own["total"],
                "planned_memory": own["memory"],
                "measured": measured,
                "ratio": own["total"] / measured,
                "ratio_without_state": (own["total"] - state) / (measured - state),
            }
        )
    return entries


def table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| model | layout | M | dtype | process | state | planned | measured | ratio | the rest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        state = entry["planned_memory"]["weights"] + entry["planned_memory"]["optimizer"]
        dtype = entry["dtype"] + (", checkpointing" if entry["gradient_checkpointing"] else "")
        lines.append(
            f"| {entry['model']} | {entry['layout']} | {entry['accumulation']} | {dtype} | {entry['process']} | "
            f"{state / MIB:.0f} | {entry['planned'] / MIB:.0f} | {entry['measured'] / MIB:.0f} | {entry['ratio']:.3f} "
            f"| {entry['ratio_without_state']:.3f} |"
        )
    return lines


def model_config(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**MODELS[model_type][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, default=2, help="of a microbatch (default: %(default)s)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--thorough", action="store_true", help="more microbatches, checkpointing, bfloat16")
    parser.add_argument("--output", type=Path, default=Path("plan.json"), help="(default: %(default)s)")
    flags = parser.parse_args()

    facts = describe_machine(torch.device("cpu"))
    imports = int(python("-c", IMPORTS))
    entries: list[dict[str, Any]] = []
    for name in flags.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder, config = Path(scratch), model_config(name)
            model = write_model(folder / "model", config)
            rows = write_rows(folder / "rows.jsonl", config.vocab_size, flags.max_length, 16 * flags.rows)
            for number, case in enumerate(cases(name, flags.thorough)):
                entries += compare(case, model, rows, flags, folder / str(number), imports)
                print("\n".join(table(entries)[-case.processes :]), file=sys.stderr, flush=True)
    print("\n".join(table(entries)))
    worst = max(entries, key=lambda entry: abs(entry["ratio"] - 1))
    print(
        f"farthest from 1: {worst['ratio']:.3f} ({worst['model']}, {worst['layout']}); imports {imports / MIB:.0f} MiB"
    )
    print(one_line(facts))
    result = {
        "benchmark": "plan",
        "command": " ".join(["python", "-m", "benchmarks.memory.plan", *sys.argv[1:]]),
        "machine": facts,
        "settings": {**vars(flags), "output": str(flags.output)},
        "environment": GIVE_BACK,
        "models": {name: {"shapes_of": MODELS[name][0], "config": MODELS[name][1]} for name in flags.models},
        "imports": imports,
        "processes": entries,
    }
    flags.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a run of a large model needs on each stage, and how the layouts compare. Arithmetic: nothing is run.

    python -m benchmarks.scaling [--gradient_checkpointing]            layouts up to 1,024 GPUs, one line each
    python -m benchmarks.scaling --model 70B --num_stages 8 ...        one run in detail

The formulas are in benchmarks/scaling/arithmetic.py; docs/scaling.md explains them and what they leave out. Memory is
in GiB (2^30 bytes), what crosses links in decimal units. A stage's seconds are its operations over --gpu_peak_tflops
times --utilization, which counts what checkpointing computes again as work.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.scaling.forecast import Gpu, forecast
from benchmarks.scaling.model_sizes import MODELS, Load, Model
from lopt_pp.config.compute import StageConfig
from lopt_pp.errors import LoptError

GIB = 2**30
GPUS_OF_A_MACHINE = 8
LAYOUTS = (
    ("7B", 2, 4, "none"),
    ("32B", 4, 8, "full"),
    ("70B", 8, 8, "full"),
    ("70B", 8, 128, "full"),
    ("70B", 32, 32, "none"),
)
"""Model, stages, replicas and sharding of the overview."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with every column as wide as its widest entry, to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in (head, *rows)]


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def describe(run: dict[str, Any]) -> str:
    load = run["load"]
    stage = load["stage"]
    return (
        f"{run['model']}, {run['parameters'] / 1e9:.2f} billion parameters with local heads\n"
        f"{run['num_stages']} stages x {run['data_parallel']} replicas = {run['gpus']:,} GPUs\n"
        f"{load['accumulation']} microbatches of {load['rows']} x {load['tokens']} tokens in a step, {stage['dtype']}"
        f"{', gradient checkpointing' if stage['gradient_checkpointing'] else ''}, sharding {load['sharding']}"
    )


def detail(run: dict[str, Any], gpu: Gpu) -> list[str]:
    """One run's tables."""
    lines = [describe(run), "", "Memory, GiB"]
    parts = ("weights", "gradients", "optimizer", "gathered", "copies", "kept", "passing", "queue")
    rows = [
        [str(need["stage"]), need["layers"], f"{need['parameters'] / 1e9:.3f}"]
        + [gib(need["memory"][part]) for part in parts]
        + [gib(need["total_bytes"]), "yes" if need["fits"] else "no"]
        for need in run["stages"]
    ]
    lines += table(["stage", "layers", "10^9 parameters", *parts, "total", f"fits {gpu.memory / GIB:g}"], rows)
    rows = [
        [
            str(need["stage"]),
            f"{need['operations'] / 1e12:.1f}",
            f"{need['microbatch_seconds']:.3f}",
            f"{need['optimizer_seconds']:.3f}",
            f"{need['microbatch_seconds'] / run['microbatch_seconds']:.2f}",
        ]
        for need in run["stages"]
    ]
    lines += [
        "",
        "Computation",
        *table(["stage", "10^12 operations", "s/microbatch", "s/optimizer", "of busiest"], rows),
    ]
    auto = run["auto_split"]
    lines += [
        f"busiest {run['microbatch_seconds']:.3f} s, mean / busiest {run['balance']:.2f}; --split "
        f"{','.join(map(str, auto['first_layers'])) or '-'} (auto): busiest {auto['microbatch_seconds']:.3f} s",
        f"step {run['step_seconds']:.2f} s, {run['tokens_per_second']:,.0f} tokens/s",
    ]
    boundary, peer = run["boundary"], run["one_f_one_b"]
    if run["data_parallel"] > 1:
        largest = max(run["stages"], key=lambda need: need["parameters"])
        lines.append(
            f"each GPU of the largest stage sends its replicas {largest['replica_bytes_per_microbatch'] / 1e9:.1f} GB "
            f"per microbatch, {largest['replica_bytes_per_step'] / 1e9:.1f} GB per step; at "
            f"{gpu.replica_link / 1e9:g} GB/s a microbatch takes {run['pace_seconds']:.3f} s"
        )
    if run["num_stages"] > 1:
        lines += [
            "",
            f"A boundary: {boundary['bytes_per_microbatch'] / 1e6:.1f} MB per microbatch and replica, "
            f"{boundary['bytes_per_second'] / 1e6:.0f} MB/s = {8e-9 * boundary['bytes_per_second']:.2f} Gbit/s; "
            f"{8e-9 * boundary['bytes_per_second_of_all_replicas']:.1f} Gbit/s for all replicas",
            f"over a link of {8e-9 * gpu.link:g} Gbit/s: {boundary['transfer_seconds']:.3f} s a message"
            f"{'' if boundary['link_carries_it'] else ': TOO SLOW, the link sets the pace'}",
        ]
        rows = [
            [
                f"{1e3 * at['delay_seconds']:g}",
                str(at["queue_depth"]),
                gib(at["queue_bytes_at_each_end"]),
                f"{at['in_flight_bytes'] / 1e6:.2f}",
                f"{at['step_seconds']:.2f}",
                f"{at['step_seconds_1f1b_one_slow_boundary']:.2f}",
                f"{at['step_seconds_1f1b']:.2f}",
            ]
            for at in run["delays"]
        ]
        head = ["one way ms", "queue_depth", "GiB at each end", "TCP window MB", "step s", "1F1B: at one", "at all"]
        lines += table(head, rows)
        lines.append(
            f"1F1B: bubble {peer['bubble']:.3f} of a step; its first stage keeps "
            f"{gib(peer['kept_bytes_on_first_stage'])} GiB, ours {gib(peer['kept_bytes_on_first_stage_of_ours'])}; "
            f"as many bytes go back"
        )
    return lines


def overview(runs: Sequence[dict[str, Any]], gpu: Gpu) -> list[str]:
    """One line for each run."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda run: run["model"],
        "stages x replicas": lambda run: f"{run['num_stages']} x {run['data_parallel']}",
        "GPUs": lambda run: f"{run['gpus']:,}",
        "sharding": lambda run: run["load"]["sharding"],
        "GiB": lambda run: gib(max(need["total_bytes"] for need in run["stages"])),
        f"fits {gpu.memory / GIB:g}": lambda run: "yes" if all(need["fits"] for need in run["stages"]) else "no",
        "s/microbatch": lambda run: f"{run['microbatch_seconds']:.3f}",
        "balance": lambda run: f"{run['balance']:.2f}",
        "MB": lambda run: f"{run['boundary']['bytes_per_microbatch'] / 1e6:.1f}",
        "Gbit/s": lambda run: f"{8e-9 * run['boundary']['bytes_per_second']:.2f}",
        "with replicas": lambda run: f"{run['pace_seconds']:.3f}",
        "tokens/s": lambda run: f"{run['tokens_per_second']:,.0f}",
        "1F1B bubble": lambda run: f"{run['one_f_one_b']['bubble']:.2f}",
    }
    return table(list(columns), [[cell(run) for cell in columns.values()] for run in runs])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help=f"{', '.join(MODELS)}, a config.json or its directory; without it, the overview")
    add("--num_stages", type=int, default=2, help="(default: %(default)s)")
    add("--data_parallel", type=int, default=1, help="replicas of the pipeline (default: %(default)s)")
    add("--sharding", choices=["none", "full"], default="none", help="among replicas (default: %(default)s)")
    add("--split", default="midpoint", help="midpoint, auto, or first layers such as 12,18 (default: %(default)s)")
    add("--rows", type=int, default=1, help="of a microbatch (default: %(default)s)")
    add("--tokens", type=int, default=4096, help="of a row (default: %(default)s)")
    add("--accumulation", type=int, default=16, help="microbatches of a step (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "pure_bfloat16"], default="bfloat16", help="(default: %(default)s)")
    add("--gradient_checkpointing", action="store_true")
    add("--gpu_peak_tflops", "--gpu-peak-tflops", type=float, default=989, help="H100 SXM, bfloat16 (%(default)s)")
    add("--utilization", type=float, default=0.4, help="share of the peak that a stage reaches (default: %(default)s)")
    add("--gpu_memory", "--gpu-memory", type=float, default=80, help="GiB (default: %(default)s)")
    add("--gpu_bandwidth", type=float, default=3.35, help="TB/s of its memory (default: %(default)s, H100 SXM)")
    add("--machine_gbytes", type=float, default=450, help="GB/s each way from GPU to GPU in a machine (%(default)s)")
    add("--network_gbytes", type=float, default=50, help="GB/s each way to a GPU of another machine (%(default)s)")
    add("--link_gbits", type=float, default=100, help="of a boundary, for one replica's stream (default: %(default)s)")
    add("--latency_ms", "--latency-ms", type=float, nargs="+", default=[0.05, 1, 10, 50, 100], help="one way")
    add("--output", type=Path, default=Path("scaling.json"), help="(default: %(default)s)")
    return parser.parse_args(arguments)


def gpu_of(flags: argparse.Namespace, replicas: int) -> Gpu:
    """The hardware that the flags describe, where a stage has that many replicas."""
    within_machine = replicas <= GPUS_OF_A_MACHINE
    return Gpu(
        flops=flags.gpu_peak_tflops * 1e12 * flags.utilization,
        memory=flags.gpu_memory * GIB,
        bandwidth=flags.gpu_bandwidth * 1e12,
        link=flags.link_gbits * 1e9 / 8,
        replica_link=(flags.machine_gbytes if within_machine else flags.network_gbytes) * 1e9,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    flags = parse(arguments)
    delays = [delay / 1e3 for delay in flags.latency_ms]
    stage = StageConfig(dtype=flags.dtype, gradient_checkpointing=flags.gradient_checkpointing)
    runs: list[dict[str, Any]] = []
    if flags.model is None:
        layouts: Sequence[tuple[str, int, int, Any]] = LAYOUTS
    else:
        layouts = [(flags.model, flags.num_stages, flags.data_parallel, flags.sharding)]
    try:
        models = {name: Model.load(name) for name in dict.fromkeys(name for name, *_ in layouts)}
        for name, num_stages, replicas, sharding in layouts:
            load = Load(flags.rows, flags.tokens, flags.accumulation, stage, replicas, sharding)
            shown = MODELS[name].name if name in MODELS else name
            gpu = gpu_of(flags, replicas)
            runs.append(forecast(shown, models[name], load, num_stages, flags.split, gpu, delays))
    except LoptError as error:
        sys.exit(f"scaling: {error}")
    print("\n".join(detail(runs[0], gpu) if flags.model else overview(runs, gpu)))
    result = {
        "benchmark": "scaling",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": {**vars(flags), "output": str(flags.output)},
        "runs": runs,
    }
    flags.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What a step of each method costs as it is really run: two processes, side by side, on the same two devices."""

import json
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods import METHODS, Trial
from runs import Ground, kept, launch, run_flags

FILLING = 2
"""Steps that do not count: the pipeline fills, and AdamW makes its state."""


def measure_speed(
    ground: Ground, method: str, learning_rate: float, steps: int, processes: int, before: Callable[[], None]
) -> dict[str, Any]:
    """A pipeline of so many processes: seconds of a step, tokens per second, memory, what is trained.

    End to end is PyTorch's 1F1B schedule; the others are this project's stream. No head warms up: that would spare the
    earlier blocks their backward in the steps that are timed.

    Args:
        ground: of the trials.
        method: of `METHODS`.
        learning_rate: of no consequence for the time.
        steps: to time, the median of which counts.
        processes: of the pipeline; 1 where there is only one device.
        before: called where it is not known from before.
    """
    place = ground.folder / f"speed-{method}.json"
    if (found := kept(place)) is not None:
        return found
    before()
    output = ground.folder / "models" / f"speed-{method}"
    trial = Trial(method, learning_rate, METHODS[method].local_shares[0], 0, steps + FILLING)
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp"]
    command += ["--nproc-per-node", str(processes), "-m", "lopt_pp.train"]
    command += [*run_flags(ground, output), *trial.flags(head_warmup=0), "--probe_steps", "0"]
    launch(command, ground, f"speed of {method}", devices=range(processes))
    result = _read(output)
    shutil.rmtree(output)
    place.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _read(output: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["step"] > FILLING]
    about = json.loads((output / "run.json").read_text())
    stages = [stage for process in about["processes"] for stage in process["stages"]]
    last = max(record["stage"] for record in records)
    # A step's evaluation is none of its own time.
    seconds = [
        record["step_seconds"] - record.get("eval_seconds", 0.0) for record in records if record["stage"] == last
    ]
    tokens = [record["num_tokens"] for record in records if record["stage"] == last]
    peaks: dict[int, int] = {}
    for record in records:
        peaks[record["stage"]] = max(peaks.get(record["stage"], 0), record["peak_memory_bytes"])
    return {
        "step_seconds": statistics.median(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "peak_memory_bytes": [peaks[stage] for stage in sorted(peaks)],
        "trained_parameters": sum(stage["trained_parameters"] for stage in stages),
    }

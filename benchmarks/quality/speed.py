"""What a step of each method costs as it is really run: two processes, side by side, on the same two devices."""

import shutil
import statistics
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.quality.methods import METHODS, Trial
from benchmarks.quality.runs import Setup, keep, kept, launch, run_flags
from lopt_pp.report.run_data import RunData, read_run

FILLING = 2
"""Steps that do not count: the pipeline fills, and AdamW makes its state."""


def measure_speed(
    setup: Setup, method: str, learning_rate: float, steps: int, processes: int, before: Callable[[], None]
) -> dict[str, Any]:
    """A pipeline of so many processes: seconds of a step, tokens per second, memory, what is trained.

    End to end is PyTorch's 1F1B schedule; the others are this project's stream. No head warms up: that would spare the
    earlier blocks their backward in the steps that are timed.

    Args:
        setup: of the trials.
        method: of `METHODS`.
        learning_rate: of no consequence for the time.
        steps: to time, the median of which counts.
        processes: of the pipeline; 1 where there is only one device.
        before: called where it is not known from before.
    """
    place = setup.folder / f"speed-{method}.json"
    if (found := kept(place)) is not None:
        return found
    before()
    output = setup.folder / "models" / f"speed-{method}"
    share = setup.form.local_shares[0] if METHODS[method].is_local else None
    trial = Trial(method, learning_rate, share, 0, steps + FILLING)
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp"]
    command += ["--nproc-per-node", str(processes), "-m", "lopt_pp.train"]
    command += ["--probe_steps", "0", *run_flags(setup, trial, output, head_warmup=0)]
    launch(command, setup, f"speed of {method}", devices=range(processes))
    result = _figures(read_run(output))
    shutil.rmtree(output)
    keep(place, result)
    return result


def _figures(run: RunData) -> dict[str, Any]:
    stages = [stage[FILLING:] for stage in run.stages]
    seconds = [record["step_seconds"] for record in stages[-1]]
    return {
        "step_seconds": statistics.median(seconds),
        "tokens_per_second": sum(record["num_tokens"] for record in stages[-1]) / sum(seconds),
        "peak_memory_bytes": [max(record["peak_memory_bytes"] for record in stage) for stage in stages],
        "trained_parameters": sum(
            stage["trained_parameters"] for process in run.about["processes"] for stage in process["stages"]
        ),
    }

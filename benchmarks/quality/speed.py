"""What a step of each method costs as it is really run: two processes, side by side, on the same two devices."""

import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.quality.methods import METHODS, Trial
from benchmarks.quality.runs import Setup, keep, kept, launch, run_flags
from lopt_pp.report.run_data import RunData, read_run

E2E, OWN_SHAPES = "e2e", "e2e, own shapes"
"""End to end by PyTorch's 1F1B, and by one that does not pad all microbatches of a step alike."""

FILLING = 2
"""Steps that do not count: the pipeline fills, and AdamW makes its state."""


def measure_speed(
    setup: Setup, method: str, learning_rate: float, steps: int, processes: int, before: Callable[[], None]
) -> dict[str, Any]:
    """A pipeline of so many processes: seconds of a step, tokens per second, memory, what is trained.

    End to end is PyTorch's 1F1B schedule, or that of `benchmarks.helpers.own_shapes`; the others are this project's
    stream. No head warms up: that would spare the
    earlier blocks their backward in the steps that are timed.

    Args:
        setup: of the trials.
        method: of `METHODS`, or `OWN_SHAPES`, in a pipeline.
        learning_rate: of no consequence for the time.
        steps: to time, the median of which counts.
        processes: of the pipeline; 1 where there is only one device.
        before: called where it is not known from before.
    """
    file, module = method, "lopt_pp.train"
    if method == OWN_SHAPES:
        file, method, module = "e2e-own-shapes", E2E, "benchmarks.quality.own_shapes_train"
    place = setup.folder / f"speed-{file}.json"
    if (found := kept(place)) is not None:
        return found
    before()
    output = setup.folder / "models" / f"speed-{file}"
    share = setup.form.local_shares[0] if METHODS[method].is_local else None
    trial = Trial(method, learning_rate, share, 0, steps + FILLING)
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "lopt-pp"]
    command += ["--nproc-per-node", str(processes), "-m", module]
    command += ["--probe_steps", "0", *run_flags(setup, trial, output, head_warmup=0)]
    launch(command, setup, f"speed of {file}", devices=range(processes))
    result = _figures(read_run(output))
    shutil.rmtree(output)
    keep(place, result)
    return result


def end_to_end_seconds(speeds: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Of a step of the faster of the two 1F1B schedules, which the others are compared with at equal wall time."""
    return min((speeds[method]["step_seconds"] for method in (E2E, OWN_SHAPES) if method in speeds), default=None)


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

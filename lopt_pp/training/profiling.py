"""Records what a process computes in some steps, by PyTorch's profiler: each operator, and on a GPU each kernel."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lopt_pp.config.topology import Topology
from lopt_pp.util.compat_torch import memory_history

logger = logging.getLogger(__name__)


@contextmanager
def profiled(steps: Iterable[int], window: range, target: Path, device: torch.device) -> Iterator[Iterable[int]]:
    """Gives the steps, and while those of a window are made, records what happens between one and the next.

    Writes TARGET.json.gz, a trace for Perfetto or chrome://tracing; from a GPU also TARGET.pickle, its memory over
    these steps, for https://docs.pytorch.org/memory_viz. A file that cannot be written costs a warning.

    Args:
        steps: of the run, from 0; `START` may be before them.
        window: the steps to record, counted from 1; without any, nothing is done.
        target: the files, but for the ends of their names.
        device: that the process computes on.
    """
    if not window:
        yield steps
        return
    recording: profile | None = None
    on_gpu = device.type == "cuda"

    def begin() -> None:
        nonlocal recording
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
        recording = profile(activities=activities, profile_memory=on_gpu)
        if on_gpu:
            memory_history(True)
        recording.start()

    def end() -> None:
        nonlocal recording
        if recording is None:
            return
        own, recording = recording, None
        own.stop()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            own.export_chrome_trace(f"{target}.json.gz")
            if on_gpu:
                memory_history(False, f"{target}.pickle")
        except (OSError, RuntimeError) as error:
            logger.warning("--profile_steps: %s cannot be written: %s", target, error)

    def given() -> Iterator[int]:
        for step in steps:
            if step + 1 in window and recording is None:
                begin()
            if recording is None:
                yield step
                continue
            with record_function(f"step {step + 1}"):
                yield step
            if step + 1 == window[-1]:
                end()

    try:
        yield given()
    finally:
        end()


def profile_path(output_dir: Path, topology: Topology, rank: int) -> Path:
    """Where a process's files are, but for the ends of their names: named by its stages, and its replica if it has
    others."""
    name = "stage-" + "-".join(map(str, topology.stages_of(rank)))
    if topology.num_replicas > 1:
        name += f"-replica-{topology.replica_of(rank)}"
    return output_dir / "profile" / name

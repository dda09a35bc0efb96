"""Output directories of runs that never took place, with times that are made up."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt_pp.metrics.records import PHASES


def record(stage: int, step: int, seconds: dict[str, float], wall: float = 1.0, **values: Any) -> dict[str, Any]:
    """A stage's record of a step, which takes `wall` seconds."""
    return {
        "stage": stage,
        "step": step,
        "num_tokens": 100,
        "tokens_per_second": 100 / wall,
        "step_seconds": wall,
        "peak_memory_bytes": 2**30,
        **{f"{phase}_seconds": seconds.get(phase, 0.0) for phase in PHASES},
        **values,
    }


def about(layers: Sequence[tuple[int, int]], processes: Sequence[Sequence[int]], **flags: Any) -> dict[str, Any]:
    """What `run.json` says of stages with these layers, and of processes with these stages."""
    stages = [
        {"stage": stage, "layers": ends, "loss": "loss", "parameters": 1_000_000} for stage, ends in enumerate(layers)
    ]
    return {
        "format": 1,
        "name": "made up",
        "started": "2026-01-02 03:04:05 +0000",
        "versions": {"lopt-pp": "0.1.0"},
        "model_class": "LlamaForCausalLM",
        "rows": "9 rows",
        "num_steps": 100,
        "flags": {"model_name_or_path": "a-model", "queue_depth": 2, "max_grad_norm": 1.0} | flags,
        "processes": [
            {"rank": rank, "host": "a", "device": "CPU", "stages": [stages[stage] for stage in own]}
            for rank, own in enumerate(processes)
        ],
    }


def write_run(
    directory: Path, records: Sequence[dict[str, Any]], facts: dict[str, Any] | None = None, **files: Any
) -> Path:
    """Writes `metrics.jsonl`, `run.json` if there are facts, and other JSON files by name."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if facts is not None:
        (directory / "run.json").write_text(json.dumps(facts))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory

"""Runs in this process, which take a fraction of a second, and what is in a directory before and after."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lopt_pp.checkpoint.manifest import seal
from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.world import connect
from lopt_pp.training.run import run

COMMON = "--num_stages 2 --per_device_train_batch_size 2 --learning_rate 1e-3 --lr_scheduler_type constant"


def train(inputs: Path, out: Path, more: str, **world: Any) -> bool:
    """Trains on the inputs of conftest.py; whether the run came to its end.

    Args:
        inputs: a folder with `model` and `rows.jsonl`.
        out: the output directory.
        more: flags; the later of two that are the same counts.
        world: what is otherwise in `World`, such as `restart`.
    """
    given = f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {out}"
    config = parse_config(f"{given} {COMMON} {more}".split())
    with connect(config.pipeline) as joined:
        return bool(run(config, dataclasses.replace(joined, **world)))


def contents(directory: Path) -> dict[str, bytes]:
    """All files, by their paths."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def rewrite_manifest(checkpoint: Path, **changes: Any) -> None:
    """Changes what a checkpoint's manifest says, and its checksum with it; None takes a value out."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text()) | changes
    del content["sha256"]
    path.write_text(json.dumps(seal({name: value for name, value in content.items() if value is not None})))

"""`run.json`: what a run is, for the reports that are made of it later."""

import json
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lopt_pp.distributed.world import World
from lopt_pp.metrics.clock_sync import Offset
from lopt_pp.metrics.mfu import Work
from lopt_pp.stage.base import BaseStage
from lopt_pp.util.files import write_text

logger = logging.getLogger(__name__)


def about_stage(stage: BaseStage, work: Work, loss: str | None) -> dict[str, Any]:
    """What one process has to say of a stage of its.

    Args:
        stage: likewise.
        work: its arithmetic.
        loss: the name of its loss; None where it has none.
    """
    block, objective = stage.block, stage.objective
    trained = _trained(block) + (0 if objective is None else _trained(objective))
    return {
        "stage": stage.index,
        "layers": [block.spec.start, block.spec.stop],
        "loss": loss,
        "parameters": sum(parameter.numel() for parameter in block.parameters()),
        "trained_parameters": trained if stage.learns else 0,
        **asdict(work),
    }


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def gather_about(world: World, own: Sequence[Mapping[str, Any]], offset: Offset) -> list[dict[str, Any]]:
    """What all processes have to say, in order of their ranks, on rank 0; nothing on the others. All must call this.

    Args:
        world: this process.
        own: of each of its stages.
        offset: of its clock.
    """
    place = {"rank": world.rank, "host": socket.gethostname(), "device": _name(world.device)}
    place |= {"clock": asdict(offset), "stages": own}
    world.store.set(f"about/{world.rank}", json.dumps(place))
    if world.rank != 0:
        return []
    return [json.loads(world.store.get(f"about/{rank}")) for rank in range(world.size)]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def write_about(
    path: Path, run_info: Mapping[str, Any], flags: Mapping[str, Any], processes: Sequence[Mapping[str, Any]]
) -> None:
    """Writes `run.json`.

    Args:
        path: of the file.
        run_info: what there is to know of the run as a whole.
        flags: of the run.
        processes: what `gather_about` gave.
    """
    content = {
        "format": 1,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {name: version(name) for name in ("lopt-pp", "torch", "transformers")},
        **run_info,
        "flags": flags,
        "processes": processes,
    }
    write_text(path, json.dumps(content, indent=1) + "\n")


def note_early_finish(path: Path, steps_done: int, reason: str) -> None:
    """Adds to `run.json` that the run has finished before all steps were made that were planned.

    Args:
        path: of the file.
        steps_done: that it has made.
        reason: in one line.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["finished_early"] = {"step": steps_done, "reason": reason}
        write_text(path, json.dumps(content, indent=1) + "\n")
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s cannot be written: %s. The model is not affected", path, error)

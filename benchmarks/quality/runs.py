"""Trains and measures, one trial a process or several side by side, and never twice: what is done stands in a file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from methods import UNTOUCHED, Trial

MEASURE = Path(__file__).with_name("measure.py")


class TrialFailed(Exception):
    """A process of a trial ended with an error; the message has its last lines."""


@dataclass(frozen=True)
class Ground:
    """What all trials of a comparison share.

    Attributes:
        folder: for results.
        model: the untouched model's directory.
        train, validation, test: files of rows.
        questions: the test questions whole; None where answers cannot be checked.
        general, instructions: files of what is to be kept.
        flags: of the program for every run.
        head_warmup: share of the steps in which local heads learn alone.
        probe_steps: steps between measurements of the drift.
        device: `cpu` or `cuda`.
        max_length: of a row in tokens.
        kept_rows: so many rows of `general` and of `instructions`.
    """

    folder: Path
    model: Path
    train: Path
    validation: Path
    test: Path
    questions: Path | None
    general: Path
    instructions: Path
    flags: tuple[str, ...]
    head_warmup: float
    probe_steps: int
    device: str
    max_length: int
    kept_rows: int


def train_and_measure(
    ground: Ground,
    trials: Sequence[Trial],
    side_by_side: int,
    before: Callable[[], None],
    after: Callable[[Trial, dict[str, Any]], None],
) -> None:
    """Trains and measures; what is done already is read.

    Trials run in one process each, with all stages in it: local learning gives the same bits in as many processes as
    there are stages, and end-to-end training the same weights but for rounding.

    Args:
        ground: what they share.
        trials: to run, in this order.
        side_by_side: how many at a time.
        before: called before each that is not done; what it raises starts no further one.
        after: called with each and its result, in whatever thread.

    Raises:
        TrialFailed: one of them did not go through. Those that ran beside it are kept.
    """
    with ThreadPoolExecutor(side_by_side) as pool:
        waiting = [pool.submit(_once, ground, trial, place, before, after) for place, trial in enumerate(trials)]
        try:
            for done in waiting:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def measure_untouched(ground: Ground) -> dict[str, Any]:
    """The same of the model as it is."""
    return kept(ground.folder / f"{UNTOUCHED}.json") or _measure(ground, ground.model, UNTOUCHED, {}, 0)


def _once(
    ground: Ground,
    trial: Trial,
    place: int,
    before: Callable[[], None],
    after: Callable[[Trial, dict[str, Any]], None],
) -> None:
    if (result := kept(ground.folder / f"{trial.name}.json")) is None:
        before()
        output = ground.folder / "models" / trial.name
        command = [sys.executable, "-m", "lopt_pp.train", *run_flags(ground, output), "--pipeline_processes", "1"]
        launch([*command, *trial.flags(ground.head_warmup)], ground, trial.name, [place])
        result = _measure(ground, output, trial.name, {"trial": asdict(trial)} | read_metrics(output), place)
        shutil.rmtree(output)
    after(trial, result)


def run_flags(ground: Ground, output: Path) -> list[str]:
    """The flags of every training run."""
    given: dict[str, object] = {
        "model_name_or_path": ground.model,
        "train_file": ground.train,
        "eval_file": ground.validation,
        "eval_steps": 0,
        "output_dir": output,
        "overwrite_output_dir": True,
        "max_length": ground.max_length,
        "probe_steps": ground.probe_steps,
        "logging_steps": 10,
        "report_to": "none",
    }
    return [*(part for name, value in given.items() for part in (f"--{name}", str(value))), *ground.flags]


def read_metrics(output: Path) -> dict[str, Any]:
    """What a run has left: the loss on the validation rows, the curve of the task loss, and the drift."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    drifts = [(record["drift_norm"], record["drift_cosine"]) for record in records if "drift_norm" in record]
    return {
        "validation_loss": next(record["eval_loss"] for record in reversed(records) if "eval_loss" in record),
        "task_loss": [record["loss"] for record in records if "loss" in record],
        # End to end in one process there is no boundary.
        **(dict(zip(("drift_norm", "drift_cosine"), drifts[-1], strict=True)) if drifts else {}),
    }


def _measure(ground: Ground, model: Path, name: str, known: dict[str, Any], place: int) -> dict[str, Any]:
    output = ground.folder / f"{name}.measured"
    command = [sys.executable, str(MEASURE), str(model), "--output", str(output), "--device", ground.device]
    for flag in ("test", "general", "instructions", "max_length", "kept_rows"):
        command += [f"--{flag}", str(getattr(ground, flag))]
    command += ["--base", str(ground.model)]
    if ground.questions is not None:
        command += ["--questions", str(ground.questions)]
    launch(command, ground, name, [place])
    result = known | json.loads(output.read_text())
    output.unlink()
    # A file that is there is whole.
    unfinished = ground.folder / f"{name}.unfinished"
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(ground.folder / f"{name}.json")
    return result


def kept(path: Path) -> dict[str, Any] | None:
    """A result from before; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def launch(command: Sequence[str], ground: Ground, name: str, devices: Sequence[int]) -> None:
    """Runs a command to its end.

    Args:
        command: to run.
        ground: of the trials.
        name: for what is said where it fails.
        devices: the GPUs that it may use, by number, around again where there are fewer.

    Raises:
        TrialFailed: its status is not zero.
    """
    environment = dict(os.environ)
    if ground.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(device % torch.cuda.device_count()) for device in devices)
    else:
        # Each process has a core.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        said = f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        raise TrialFailed(f"{name} failed with status {result.returncode}: {' '.join(command)}\n{said}")

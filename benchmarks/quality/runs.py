"""Trains and measures, one trial a process or several side by side, and never twice: what is done is kept in a file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.quality.forms import Form
from benchmarks.quality.methods import UNTOUCHED, Trial
from lopt_pp.report.run_data import RunData, read_run
from lopt_pp.util.files import write_text


class TrialFailed(Exception):
    """A process of a trial ended with an error; the message has its last lines."""


@dataclass(frozen=True)
class Setup:
    """What all trials of a comparison share.

    Attributes:
        folder: for results.
        model: the untouched model's directory.
        train, validation, test: files of rows.
        questions: file with the test questions whole; None where answers cannot be checked.
        general, instructions: files of what is to be kept.
        form: the size of all of it.
        flags: further ones of the program for every run.
        device: `cpu` or `cuda`.
        tasks: benchmarks of lm-evaluation-harness to measure by, besides.
        include_path: directory with benchmarks of one's own; None where there are none.
        limit: items of each benchmark, or a share of them below 1; None is all.
        method_flags: further flags of the program for the runs of a method, by its name.
    """

    folder: Path
    model: Path
    train: Path
    validation: Path
    test: Path
    questions: Path | None
    general: Path
    instructions: Path
    form: Form
    flags: tuple[str, ...]
    device: str
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    limit: float | None = None
    method_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def train_and_measure(
    setup: Setup,
    trials: Sequence[Trial],
    side_by_side: int,
    before: Callable[[], None],
    after: Callable[[Trial, dict[str, Any]], None],
) -> None:
    """Trains and measures; what is done already is read.

    Trials run in one process each, with all stages in it: local learning gives the same bits in as many processes as
    there are stages, and end-to-end training the same weights but for rounding.

    Args:
        setup: what they share.
        trials: to run, in this order.
        side_by_side: how many at a time, each on a device of its own.
        before: called before each that is not done; what it raises starts no further one.
        after: called with each and its result, in whatever thread.

    Raises:
        TrialFailed: one of them did not go through. Those that ran beside it are kept.
    """
    free: SimpleQueue[int] = SimpleQueue()
    for device in range(side_by_side):
        free.put(device)

    def once(trial: Trial) -> None:
        device = free.get()
        try:
            if (result := kept(setup.folder / f"{trial.name}.json")) is None:
                before()
                result = _train_and_measure(setup, trial, device)
            after(trial, result)
        finally:
            free.put(device)

    with ThreadPoolExecutor(side_by_side) as pool:
        waiting = [pool.submit(once, trial) for trial in trials]
        try:
            for done in waiting:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def measure_untouched(setup: Setup) -> dict[str, Any]:
    """The same of the model as it is."""
    return kept(setup.folder / f"{UNTOUCHED}.json") or _measure(setup, setup.model, UNTOUCHED, {}, 0)


def _train_and_measure(setup: Setup, trial: Trial, device: int) -> dict[str, Any]:
    output = setup.folder / "models" / trial.name
    command = [sys.executable, "-m", "lopt_pp.train", "--pipeline_processes", "1"]
    command += ["--eval_file", str(setup.validation), "--eval_steps", "0"]
    command += ["--probe_steps", str(max(1, setup.form.steps // 4))]
    launch(
        [*command, *run_flags(setup, trial, output, setup.form.head_warmup)],
        setup,
        trial.name,
        [device],
    )
    result = _measure(setup, output, trial.name, {"trial": asdict(trial)} | _figures(read_run(output)), device)
    shutil.rmtree(output)
    return result


def run_flags(setup: Setup, trial: Trial, output: Path, head_warmup: float) -> list[str]:
    """The flags of a training run; the user's come last, and win.

    Args:
        setup: what all trials share.
        trial: what this one has of its own.
        output: directory.
        head_warmup: share of the steps in which local heads learn alone.
    """
    form = setup.form
    given: dict[str, object] = {
        "model_name_or_path": setup.model,
        "train_file": setup.train,
        "output_dir": output,
        "overwrite_output_dir": True,
        "save_steps": 0,
        "max_length": form.max_length,
        "per_device_train_batch_size": form.batch,
        "gradient_accumulation_steps": form.accumulation,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.1,
        "report_to": "none",
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    flags += [*form.flags, *trial.flags(form.head_rate, head_warmup)]
    return [*flags, *setup.flags, *setup.method_flags.get(trial.method, ())]


def _figures(run: RunData) -> dict[str, Any]:
    """What a run has left: the loss on the validation rows, the curve of the task loss, and the drift."""
    last = len(run.stages) - 1
    figures = {"validation_loss": run.curve(last, "eval_loss")[1][-1], "task_loss": run.curve(last, "loss")[1]}
    # Of the last boundary. There is none where the model is one block, and none drifts where nothing before it learns.
    for name in ("drift_norm", "drift_cosine"):
        if values := run.curve(max(last - 1, 0), name)[1]:
            figures[name] = values[-1]
    return figures


def _measure(setup: Setup, model: Path, name: str, known: dict[str, Any], device: int) -> dict[str, Any]:
    output = setup.folder / f"{name}.measured"
    command = [sys.executable, "-m", "benchmarks.quality.measure", str(model), "--output", str(output)]
    command += ["--device", setup.device]
    for flag in ("test", "general", "instructions"):
        command += [f"--{flag}", str(getattr(setup, flag))]
    command += ["--base", str(setup.model)]
    command += ["--max_length", str(setup.form.max_length), "--kept_rows", str(setup.form.kept_rows)]
    if setup.questions is not None:
        command += ["--questions", str(setup.questions)]
    if setup.tasks:
        command += ["--tasks", *setup.tasks]
        command += [] if setup.include_path is None else ["--include_path", str(setup.include_path)]
        command += [] if setup.limit is None else ["--limit", str(setup.limit)]
    launch(command, setup, name, [device])
    result = known | json.loads(output.read_text())
    output.unlink()
    keep(setup.folder / f"{name}.json", result)
    return result


def keep(path: Path, result: dict[str, Any]) -> None:
    """Writes a result. A file that is there is whole."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def kept(path: Path) -> dict[str, Any] | None:
    """A result from before; None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def launch(command: Sequence[str], setup: Setup, name: str, devices: Sequence[int]) -> None:
    """Runs a command to its end.

    Args:
        command: to run.
        setup: of the trials.
        name: for what is said where it fails.
        devices: the GPUs that it may use, by number.

    Raises:
        TrialFailed: its status is not zero.
    """
    # Model and rows are files; benchmarks alone may have to be had from a hub.
    environment = ({} if setup.tasks else {"HF_HUB_OFFLINE": "1"}) | dict(os.environ)
    if setup.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    else:
        # Each process has a core.
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        said = f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        raise TrialFailed(f"{name} failed with status {result.returncode}: {' '.join(command)}\n{said}")

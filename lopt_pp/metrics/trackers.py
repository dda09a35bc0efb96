"""Hands the metrics of all stages to a tracker, as one run. Called by rank 0's collector, off the training path."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lopt_pp.config.monitoring import ReportConfig
from lopt_pp.errors import LoptError, first_line
from lopt_pp.metrics.records import Record, is_measured, time_shares

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Is told of every step that all stages have reported."""

    name: str
    """What it is called in a warning."""

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        """Takes the records of a step.

        Args:
            step: counted from 1; 0 is an evaluation before the first.
            records: of each stage, as `metrics.jsonl` has them.
            replicas: of each stage, those of its replicas, with their intervals.
        """

    def end(self) -> None:
        """The run has come to its end, or was stopped."""


class TensorBoard:
    """Writes TensorBoard's event files.

    Args:
        directory: for them.
        steps_done: before this run; what the directory has of later ones is dropped from the charts.

    Raises:
        LoptError: the directory cannot be written.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path, steps_done: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # Slow to import.

        try:
            self._writer = SummaryWriter(str(directory), purge_step=steps_done + 1 if steps_done else None)
        except OSError as error:
            raise LoptError(f"--logging_dir {directory} cannot be written: {error.strerror}") from error

    def describe(self, flags: Mapping[str, Any]) -> None:
        """Adds the run's flags, as a table."""
        rows = "\n".join(f"| `--{name}` | {value} |" for name, value in flags.items())
        self._writer.add_text("flags", f"| flag | value |\n|---|---|\n{rows}")

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        for name, value in scalars(records).items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases, which its own environment variables configure (WANDB_MODE, WANDB_ENTITY, ...).

    Args:
        directory: for its files.
        run_name: what the run is called there.
        flags: of the run.

    Raises:
        LoptError: it cannot begin (no login, no network).
    """

    name = "Weights & Biases"

    def __init__(self, directory: Path, run_name: str, flags: Mapping[str, Any]) -> None:
        import wandb

        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(name=run_name, dir=str(directory), config=dict(flags))
        except Exception as error:  # Of many kinds, its own and the network's.
            raise LoptError(f"--report_to wandb: {first_line(error)}") from error

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        self._run.log(scalars(records), step=step)

    def end(self) -> None:
        self._run.finish()


def check_installed(config: ReportConfig) -> None:
    """Sees that the tracker which the flags ask for is there, before anything takes long.

    Raises:
        LoptError: it is not.
    """
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise LoptError(
            f"--report_to {config.report_to} needs the package {config.report_to}, which is not installed: pip install "
            f"{config.report_to}"
        )


def open_tracker(
    config: ReportConfig, output_dir: Path, flags: Mapping[str, Any], steps_done: int
) -> TensorBoard | WeightsAndBiases | None:
    """The tracker that the flags ask for.

    Args:
        config: the flags.
        output_dir: of the run.
        flags: all of the run's, for the tracker to show.
        steps_done: before this run.

    Raises:
        LoptError: it cannot begin.
    """
    directory = Path(config.logging_dir) if config.logging_dir is not None else output_dir / "runs"
    if config.report_to == "tensorboard":
        tracker = TensorBoard(directory / config.run_name if config.run_name else directory, steps_done)
        tracker.describe(flags)
        return tracker
    if config.report_to == "wandb":
        return WeightsAndBiases(directory, config.run_name or output_dir.resolve().name, flags)
    return None


def scalars(records: Sequence[Record]) -> dict[str, float]:
    """What a tracker shows of a step: by name and stage, such as `learning_rate/stage 0`; seconds as shares of it.

    Of step 0, in which nothing is trained, only what was measured on the held-out rows.
    """
    values: dict[str, float] = {}
    for record in records:
        if record["step"] == 0:
            values |= {f"{name}/stage {record['stage']}": record[name] for name in record if is_measured(name)}
            continue
        own = {name: value for name, value in record.items() if not name.endswith("_seconds")}
        own |= {f"share {what}": share for what, share in time_shares(record).items()}
        own["step_seconds"] = record["step_seconds"]
        for name, value in own.items():
            if name not in ("step", "stage", "epoch"):
                values[f"{name}/stage {record['stage']}"] = float(value)
    return values

"""Trackers of `--report_to`: the callbacks that `transformers.integrations` has, set up for a run that may go on."""

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

from lopt_pp.config.monitoring import ReportConfig
from lopt_pp.errors import LoptError
from lopt_pp.metrics.arguments import RunArguments
from lopt_pp.metrics.callbacks import Called
from lopt_pp.metrics.installed import in_kubeflow


def chosen(config: ReportConfig) -> tuple[str, ...]:
    """The trackers that the flags ask for, by their names in transformers; with `all` those that are installed."""
    names = config.report_to or []
    if "all" in names:
        return tuple(get_available_reporting_integrations())
    wanted = [name for name in names if name != "none"] + (["kubeflow"] if in_kubeflow() else [])
    return tuple(dict.fromkeys(wanted))


def open_trackers(
    names: Sequence[str], config: ReportConfig, arguments: RunArguments, run_id: str, steps_done: int
) -> list[Called]:
    """The callbacks of the trackers, which begin when they are told so.

    A run that goes on from a checkpoint goes on in its trackers where these can: in TensorBoard, where what comes after
    the checkpoint is dropped from the charts, Weights & Biases, MLflow, Comet, SwanLab and Trackio.

    Args:
        names: of `chosen`.
        config: the flags.
        arguments: of the run.
        run_id: of the run, the same after a resume; 32 hexadecimal digits.
        steps_done: before this process began.

    Raises:
        LoptError: one cannot be set up.
    """
    directory = Path(config.logging_dir) if config.logging_dir is not None else Path(str(arguments.output_dir)) / "runs"
    called = []
    for name in names:
        kind = get_reporting_integration_callbacks([name])[0]
        if name == "tensorboard":
            called.append(Called(kind(_tensorboard(config, directory, steps_done)), f"--report_to {name}"))
            continue
        session = _Session(name, config, directory, run_id, steps_done, str(arguments.run_name))
        called.append(Called(kind(), f"--report_to {name}", beginning=session.begin, finish=session.finish))
        if name == "trackio" and config.run_name is None:
            # It takes runs of one name for one run, and many an output directory is called "out".
            called[-1].arguments = copy(arguments)
            called[-1].arguments.run_name = f"{arguments.run_name}-{run_id[:8]}"
    return called


def _tensorboard(config: ReportConfig, directory: Path, steps_done: int) -> object:
    """A writer of TensorBoard's event files that drops later steps than those done: transformers' own would not."""
    from torch.utils.tensorboard.writer import SummaryWriter  # Slow to import.

    if config.logging_dir is None:
        directory = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", directory)).expanduser()
    directory = directory / config.run_name if config.run_name else directory
    try:
        return SummaryWriter(str(directory), purge_step=steps_done + 1 if steps_done else None)
    except OSError as error:
        raise LoptError(f"--logging_dir {directory} cannot be written: {error.strerror}") from error


class _Session:
    """A run of a tracker, from its beginning to its end.

    Args:
        name: of the tracker in transformers.
        config: the flags.
        directory: for files of the tracker's own.
        run_id: of the run.
        steps_done: before this process began.
        run_name: of the run.
    """

    def __init__(
        self, name: str, config: ReportConfig, directory: Path, run_id: str, steps_done: int, run_name: str
    ) -> None:
        self._name, self._config, self._directory, self._run_name = name, config, directory, run_name
        self._run_id, self._steps_done = run_id, steps_done
        self._is_others = False
        """Whether whoever calls us had begun it before, and will end it."""

    @contextmanager
    def begin(self) -> Iterator[None]:
        """Has a tracker begin with what its environment variables say, and with ours where they say nothing."""
        module = None if self._name not in _RUNNING else importlib.import_module(self._name)
        self._is_others = module is not None and _RUNNING[self._name](module) is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        with _environment(self._variables()):
            if self._name == "swanlab" and not self._is_others:
                self._begin_swanlab()
            yield

    def _begin_swanlab(self) -> None:
        """Begins SwanLab's run: the callback of transformers 5.23 asks for it, and SwanLab 0.10 raises where it is not.

        It takes its own variables where it is given nothing, but not all that the callback reads.
        """
        import swanlab

        own = {} if "SWANLAB_RUN_ID" in os.environ else {"id": self._run_id, "resume": "allow"}
        project = self._config.project or os.environ.get("SWANLAB_PROJECT")
        swanlab.init(project=project, experiment_name=self._run_name, logdir=str(self._directory), **own)

    def _variables(self) -> dict[str, str | None]:
        project, directory, run_id = self._config.project, str(self._directory), self._run_id
        if self._name == "wandb":
            own = {"WANDB_PROJECT": project, "WANDB_DIR": directory}
            return own | ({} if "WANDB_RUN_ID" in os.environ else {"WANDB_RUN_ID": run_id, "WANDB_RESUME": "allow"})
        if self._name == "comet_ml":
            own = {"COMET_PROJECT_NAME": project, "COMET_OFFLINE_DIRECTORY": directory}
            return own | {"COMET_EXPERIMENT_KEY": run_id}
        if self._name == "mlflow":
            own = {"MLFLOW_EXPERIMENT_NAME": project, "MLFLOW_TAGS": json.dumps({_MLFLOW_TAG: run_id})}
            # It refuses another value of a flag, and a run that goes on may have one, so those of the first stay.
            earlier = self._mlflow_run() if self._steps_done else None
            return own | ({"MLFLOW_RUN_ID": earlier, "MLFLOW_MAX_LOG_PARAMS": "0"} if earlier else {})
        return {}

    def _mlflow_run(self) -> str | None:
        """The id of MLflow's run of this run, which chooses its ids itself; None where it has none."""
        import mlflow

        experiments = os.environ.get("MLFLOW_EXPERIMENT_NAME", self._config.project)
        found = mlflow.search_runs(
            experiment_names=None if experiments is None else [experiments],
            filter_string=f"tags.`{_MLFLOW_TAG}` = '{self._run_id}'",
            max_results=1,
            output_format="list",
        )
        return found[0].info.run_id if found else None

    def finish(self) -> None:
        """Ends what we have begun, so that another run of this process is another one in the tracker as well."""
        if self._name in _RUNNING and not self._is_others:
            module = importlib.import_module(self._name)
            module.end() if self._name == "comet_ml" else module.finish()


_MLFLOW_TAG = "lopt_pp.run_id"

_RUNNING: Mapping[str, Callable[[Any], object]] = {
    "comet_ml": lambda module: module.get_running_experiment(),
    "swanlab": lambda module: module.get_run() if module.has_run() else None,
    "wandb": lambda module: module.run,
}
"""The run that is going on in this process, of trackers whose callbacks leave it open at the end."""


@contextmanager
def _environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Adds variables to the environment for a while, where it does not have them."""
    added = {name: value for name, value in values.items() if value is not None and name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)  # MLflow takes its own away by itself.

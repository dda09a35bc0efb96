"""Whether the trackers of `--report_to` are installed, asked without importing any of them."""

import importlib.util
import os
from collections.abc import Mapping, Sequence

from lopt_pp.config.monitoring import ReportConfig
from lopt_pp.errors import LoptError

_PACKAGES: Mapping[str, Sequence[str]] = {
    "azure_ml": ["azureml"],
    "flyte": ["flytekit"],
    "kubeflow": [],
    "tensorboard": ["tensorboard", "tensorboardX"],
}
"""Where it has another name than the tracker: a package that the tracker needs; any of them will do."""

_ON_THE_INDEX = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""What to install, where it has another name than the tracker."""


def check_installed(config: ReportConfig) -> None:
    """Sees that the trackers which the flags ask for are there, before anything takes long.

    Raises:
        LoptError: one is not.
    """
    for name in config.report_to or []:
        packages = [] if name in ("all", "none") else _PACKAGES.get(name, [name])
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            package = _ON_THE_INDEX.get(name, packages[0])
            raise LoptError(
                f"--report_to {name} needs the package {package}, which is not installed: pip install {package}"
            )


def tracks(config: ReportConfig) -> bool:
    """Whether the flags, or a job of Kubeflow's, which transformers tells of its progress, ask for a tracker."""
    return config.report_to not in (None, ["none"]) or in_kubeflow()


def in_kubeflow() -> bool:
    return "KUBEFLOW_TRAINER_SERVER_URL" in os.environ

"""LoPT-PP: pipeline-parallel post-training by local learning.

from lopt_pp import Trainer, load_config

trainer = Trainer("Qwen/Qwen3-0.6B", args={"output_dir": "out"}, train_dataset=dataset)  # As TRL's SFTTrainer.
trainer = Trainer(load_config("run.yaml"))
trainer.train()
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lopt_pp.config.parser import load_config
    from lopt_pp.config.train_config import Config
    from lopt_pp.distributed.functions import launch
    from lopt_pp.errors import LoptError
    from lopt_pp.training.result import TrainResult
    from lopt_pp.training.session import RunError
    from lopt_pp.training.trainer import Trainer

    __version__: str

__all__ = ["Config", "LoptError", "RunError", "TrainResult", "Trainer", "launch", "load_config"]

_HOMES = {
    "Config": "lopt_pp.config.train_config",
    "LoptError": "lopt_pp.errors",
    "RunError": "lopt_pp.training.session",
    "TrainResult": "lopt_pp.training.result",
    "Trainer": "lopt_pp.training.trainer",
    "launch": "lopt_pp.distributed.functions",
    "load_config": "lopt_pp.config.parser",
}


def __getattr__(name: str) -> object:
    """Imports what is asked for only then: `lopt-pp --help` need not wait for torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lopt-pp")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

"""A run of six steps in a tracker, stopped after the fourth and gone on with from the third, as a program.

Arguments: the tracker's name, the output directory, the steps done before. Each tracker is tried in processes of its
own, since their libraries keep a run, threads and what is to be done at exit in the process.
"""

import sys
from types import SimpleNamespace
from typing import Any

from synthetic_runs import record
from transformers import LlamaConfig

from lopt_pp.config.parser import load_config
from lopt_pp.metrics.arguments import as_training_arguments
from lopt_pp.metrics.callbacks import Callbacks
from lopt_pp.metrics.trackers import chosen, open_trackers

RUN_ID = "0123456789abcdef0123456789abcdef"


def of_step(step: int) -> list[dict[str, Any]]:
    return [
        record(0, step, {"forward": 0.5}, reconstruction_loss=1.0 / step, grad_norm=0.5, epoch=step / 3),
        record(1, step, {"forward": 0.5}, loss=2.0 / step, grad_norm=1.5, learning_rate=1e-4, epoch=step / 3),
    ]


def track(name: str, output_dir: str, steps_done: int, **flags: Any) -> None:
    """Steps 1 to 4 of a new run, or 4 to 6 of one that goes on, for more steps in all, from step 3."""
    given: dict[str, Any] = {
        "model_name_or_path": "m",
        "train_file": "rows.jsonl",
        "output_dir": output_dir,
        "report_to": name,
    }
    given |= {"logging_steps": 1, "max_steps": 7 if steps_done else 6, "project": "lopt-test"}
    config = load_config(**given | flags)
    names = chosen(config.report)
    arguments = as_training_arguments(config, 6, evaluates=False, reports_to=names)
    model = SimpleNamespace(config=LlamaConfig(num_hidden_layers=2))
    called = open_trackers(names, config.report, arguments, RUN_ID, steps_done)
    callbacks = Callbacks(called, arguments, 6, steps_done, model=model)
    callbacks.begin()
    for step in range(4, 7) if steps_done else range(1, 5):
        callbacks.step(step, of_step(step), [])
    callbacks.saved(4)
    callbacks.end()


if __name__ == "__main__":
    track(sys.argv[1], sys.argv[2], int(sys.argv[3]))

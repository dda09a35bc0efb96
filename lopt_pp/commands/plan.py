"""`lopt-pp plan RUN_YAML_OR_MODEL FLAGS`: what a run will need, from the model's config alone."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from lopt_pp.commands.common import LOADING, be_quiet, say
from lopt_pp.config.compute import StageConfig
from lopt_pp.config.launch import LaunchConfig
from lopt_pp.config.model import ModelConfig
from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.parser import parse_components
from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.plan import PlanConfig
from lopt_pp.config.train_config import COMPONENTS
from lopt_pp.errors import as_usage_errors
from lopt_pp.model.on_hub import check_named
from lopt_pp.planning.tables import describe

_DESCRIPTION = """\
Says what a training run with these flags needs, from the model's config alone, without weights and without a GPU: of
each process the parameters, the memory and the floating-point operations, and the bytes that cross each boundary; the
same for end-to-end training; whether it fits into --gpu_memory (else the exit status is 1), and what would make it fit.

  lopt-pp plan run.yaml --gpu_memory 80
  lopt-pp plan meta-llama/Llama-3.1-8B --num_stages 2 --per_device_train_batch_size 4 --max_length 4096 --gpu_memory 80

The first argument is the YAML file of a training run, as it is, or a model: its directory, its config.json or its id on
the hub. The flags are those of lopt-pp train on model, stages, objective, optimizer and size of a step, and win over
the file. Those on data, output and checkpoints change nothing here: they are left out of the file, and refused
elsewhere.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 1 it does not fit into `--gpu_memory`, 2 unusable flags."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-"):
        given.insert(0, "--config" if given[0].endswith((".yaml", ".yml")) else "--model_name_or_path")
    components = [ModelConfig, PipelineConfig, ObjectiveConfig, OptimConfig, StageConfig, PlanConfig]
    usage = "lopt-pp plan RUN_YAML_OR_MODEL FLAGS"
    unused = {field.name for component in (*COMPONENTS, LaunchConfig) for field in dataclasses.fields(component)}
    with as_usage_errors():
        configs, _ = parse_components(components, given, "lopt-pp plan", usage, _DESCRIPTION, unused=unused)
        check_named(configs[0])
        result = _plan(*configs)
    print(json.dumps(result, indent=1) if configs[-1].json else describe(result))
    return 1 if result["fits"] is False else 0


def _plan(*configs: Any) -> dict[str, Any]:
    planned, other = ("CPUs", "cuda plans for GPUs") if configs[-1].device == "cpu" else ("GPUs", "cpu plans for CPUs")
    say(f"planning for {planned} (--device {other}); {LOADING}")
    # Late, so that --help and a mistake in a flag do not wait for torch.
    from lopt_pp.planning.plan import plan

    be_quiet()
    say("working out what each stage needs")
    pipeline, flags = configs[1], configs[-1]
    if flags.nproc is not None:
        laid = pipeline.topology(flags.nproc)
        layout = {"pipeline_processes": laid.num_processes, "data_parallel": laid.num_replicas}
        configs = (configs[0], dataclasses.replace(pipeline, **layout), *configs[2:])
    return plan(*configs)

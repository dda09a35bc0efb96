"""`lopt-pp plan MODEL_OR_CONFIG FLAGS`: what a run will need, from the model's config alone."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import transformers

from lopt_pp.computation import StageConfig
from lopt_pp.config import parse_components
from lopt_pp.errors import LoptError
from lopt_pp.estimate import Model
from lopt_pp.fitting import Layout, fits, remedies
from lopt_pp.flags import check_types
from lopt_pp.guard import complain
from lopt_pp.model import ModelConfig, load_model_config
from lopt_pp.needs import Load, Needs
from lopt_pp.objectives import ObjectiveConfig
from lopt_pp.optim import OptimConfig
from lopt_pp.plan_text import GIB, describe
from lopt_pp.span import Span, split_at, split_evenly
from lopt_pp.topology import PipelineConfig

_DESCRIPTION = """\
Says what a training run with these flags needs, from the model's config alone, without weights and without a GPU: of
each process the parameters, the memory and the floating-point operations, and the bytes that cross each boundary; the
same for end-to-end training; whether it fits into --gpu_memory, and what would make it fit.

  lopt-pp plan meta-llama/Llama-3.1-8B --num_stages 2 --per_device_train_batch_size 4 --max_length 4096 --gpu_memory 80

The flags are those of lopt-pp train, and may stand in a YAML file given by --config FILE.
"""


@dataclass(frozen=True)
class PlanConfig:
    """What a run computes on, and where."""

    _argument_group_name: ClassVar[str] = "Plan"

    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows of a microbatch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Microbatches of an optimizer step."})
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens of a row. Memory goes by the longest rows, so all are taken to be full."},
    )
    gpu_memory: float | None = field(
        default=None, metadata={"help": "GiB of memory that each process has, to say whether the run fits."}
    )
    device: Literal["cuda", "cpu"] = field(
        default="cuda", metadata={"help": "What the run computes on. No GPU is needed to plan for one."}
    )
    json: bool = field(default=False, metadata={"help": "Print one JSON object in place of tables; sizes in bytes."})

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (("per_device_train_batch_size", 1), ("gradient_accumulation_steps", 1), ("max_length", 2)):
            if getattr(self, name) < least:
                raise LoptError(f"--{name} {getattr(self, name)}: at least {least}")
        if self.gpu_memory is not None and self.gpu_memory <= 0:
            raise LoptError(f"--gpu_memory {self.gpu_memory:g}: a number of GiB above 0")


def plan(
    model_flags: ModelConfig,
    pipeline: PipelineConfig,
    objective: ObjectiveConfig,
    optim: OptimConfig,
    stage: StageConfig,
    flags: PlanConfig,
) -> dict[str, Any]:
    """Everything about a run, as plain data: sizes are in bytes, the rest are numbers of something.

    Raises:
        LoptError: the flags do not fit together, or the model cannot be split or planned.
    """
    if objective.method == "e2e":
        raise LoptError("--method e2e: end-to-end training is planned beside any other method; leave the flag away")
    objective.check_accumulation(flags.gradient_accumulation_steps)
    load = Load(
        rows=flags.per_device_train_batch_size,
        tokens=flags.max_length,
        accumulation=flags.gradient_accumulation_steps,
        stage=replace(stage, torch_compile=False),
        objective=objective,
        optim=optim,
        queue_depth=pipeline.queue_depth,
        replicas=pipeline.data_parallel or 1,
        sharding=pipeline.sharding,
        device=torch.device(flags.device),
    )
    layout = Layout(load, pipeline)
    topology = layout.topology  # Complains early.
    config = load_model_config(model_flags)
    model = Model(config, _cut_by_hand(pipeline, config), model_flags.trust_remote_code)
    spans = layout.spans(model)
    balanced = layout.balanced(model) if len(spans) > 1 else spans
    processes = layout.processes(model)
    memory = None if flags.gpu_memory is None else flags.gpu_memory * GIB
    single = Span(0, 1, 0, model.depth)
    result = {
        "model": model.model_class.__name__,
        "num_layers": model.depth,
        "num_stages": len(spans),
        "num_processes": topology.num_processes,
        "num_replicas": load.replicas,
        "rows": load.rows,
        "tokens": load.tokens,
        "accumulation": load.accumulation,
        "dtype": load.stage.dtype,
        "gradient_checkpointing": load.stage.gradient_checkpointing,
        "method": objective.method,
        "local_objective": objective.local,
        "sharding": load.sharding,
        "queue_depth": load.queue_depth,
        "device": flags.device,
        "memory_per_device": memory,
        "stages": [_entry([span], model.process([span], load), memory) for span in spans],
        "processes": [_entry(held, needs, memory) for held, needs in processes],
        "boundary": {
            "bytes_per_microbatch": model.message_bytes(load) if len(spans) > 1 else 0,
            "bytes_per_operation": _bytes_per_operation(model, load, processes),
        },
        "balanced": {
            "first_layers": [span.start for span in balanced[1:]],
            "operations": _busiest(model, layout, balanced),
            "operations_as_planned": max(needs.operations for _, needs in processes),
        },
        "end_to_end": {
            "one_process": _entry([single], model.process([single], load), memory),
            "pipeline": [_entry([span], model.pipeline_process(span, load), memory) for span in spans]
            if len(spans) > 1
            else [],
        },
        "fits": None,
        "remedies": [],
        "fits_with_remedies": None,
    }
    if memory is not None:
        result["fits"] = all(fits(needs.memory.total, memory) for _, needs in processes)
        if not result["fits"]:
            found, result["fits_with_remedies"] = remedies(model, layout, memory)
            result["remedies"] = [asdict(remedy) for remedy in found]
    return result


def _cut_by_hand(pipeline: PipelineConfig, config: transformers.PreTrainedConfig) -> tuple[Span, ...] | None:
    """The blocks whose cuts the split is to be checked at, where they are known."""
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        return None  # The model will be refused.
    cuts = pipeline.boundaries
    return split_at(cuts, depth) if cuts is not None else split_evenly(depth, pipeline.num_stages)


def _entry(spans: Sequence[Span], needs: Needs, memory: float | None) -> dict[str, Any]:
    return {
        "stages": [span.stage for span in spans],
        "layers": [[span.start, span.stop - 1] for span in spans],
        "parameters": needs.parameters,
        "memory": asdict(needs.memory),
        "total": needs.memory.total,
        "kept_for_backward": needs.kept,
        "operations": needs.operations,
        "fits": None if memory is None else fits(needs.memory.total, memory),
    }


def _bytes_per_operation(model: Model, load: Load, processes: Sequence[tuple[Sequence[Span], Needs]]) -> float:
    """Bytes that a boundary between processes carries for each operation of the busiest process."""
    if len(processes) == 1:
        return 0.0
    return model.message_bytes(load) / max(needs.operations for _, needs in processes)


def _busiest(model: Model, layout: Layout, spans: Sequence[Span]) -> int:
    """The operations of the busiest process for a microbatch, with these blocks."""
    cuts = ",".join(str(span.start) for span in spans[1:])
    pipeline = replace(layout.pipeline, split=cuts) if cuts else layout.pipeline
    return max(needs.operations for _, needs in replace(layout, pipeline=pipeline).processes(model))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0 done, 2 unusable flags or model."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-"):
        given.insert(0, "--model_name_or_path")
    for library in ("transformers", "httpx", "huggingface_hub", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    components = [ModelConfig, PipelineConfig, ObjectiveConfig, OptimConfig, StageConfig, PlanConfig]
    try:
        configs = parse_components(
            components, given, "lopt-pp plan", "lopt-pp plan MODEL_OR_CONFIG [--config FILE] FLAGS", _DESCRIPTION
        )
        result = plan(*configs)
    except LoptError as error:
        complain(str(error))
        return 2
    print(json.dumps(result, indent=1) if configs[-1].json else describe(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a run will need, from the model's config alone."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import transformers

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.model import ModelConfig
from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.config.plan import PlanConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.location import has_weights
from lopt_pp.model.partition import BlockSpec, split_at, split_evenly
from lopt_pp.model.pretrained import load_model_config, load_tokenizer
from lopt_pp.model.stored import without_quantization
from lopt_pp.model.vocabulary import grown
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.planning.capacity import Layout, fits, remedies
from lopt_pp.planning.estimate import Model
from lopt_pp.planning.tables import GIB
from lopt_pp.planning.workload import Requirements, Workload


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
        raise LoptError(
            "--method e2e: end-to-end training is planned beside any other method; leave the flag away, or give "
            "--method lopt"
        )
    objective.check_accumulation(flags.gradient_accumulation_steps)
    workload = Workload(
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
    layout = Layout(workload, pipeline)
    topology = layout.topology  # Raises early.
    name = model_flags.model_name_or_path
    config = load_model_config(model_flags)
    if model_flags.added_tokens:
        config, _ = grown(config, load_tokenizer(model_flags), model_flags, seed=0)
    # Weights that are there tell whether they are quantized, as the config may say; none are fetched for it.
    config = without_quantization(config, name, PretrainedWeights(name) if has_weights(name) else None)
    model = Model(config, _cut_by_hand(pipeline, config), model_flags.trust_remote_code)
    specs = layout.specs(model)
    balanced = layout.balanced(model) if len(specs) > 1 else specs
    processes = layout.processes(model)
    memory = None if flags.gpu_memory is None else flags.gpu_memory * GIB
    single = BlockSpec(0, 1, 0, model.depth)
    result = {
        "model": model.model_class.__name__,
        "num_layers": model.depth,
        "num_stages": len(specs),
        "num_processes": topology.num_processes,
        "num_replicas": workload.replicas,
        "rows": workload.rows,
        "tokens": workload.tokens,
        "accumulation": workload.accumulation,
        "dtype": workload.stage.dtype,
        "gradient_checkpointing": workload.stage.gradient_checkpointing,
        "method": objective.method,
        "local_objective": objective.local,
        "sharding": workload.sharding,
        "queue_depth": workload.queue_depth,
        "device": flags.device,
        "memory_per_device": memory,
        "stages": [_entry([spec], model.process([spec], workload), memory) for spec in specs],
        "processes": [_entry(blocks, requirements, memory) for blocks, requirements in processes],
        "boundary": {
            "bytes_per_microbatch": model.message_bytes(workload) if len(specs) > 1 else 0,
            "bytes_per_operation": _bytes_per_operation(model, workload, processes),
        },
        "balanced": {
            "first_layers": [spec.start for spec in balanced[1:]],
            "operations": _busiest(model, layout, balanced),
            "operations_as_planned": max(requirements.operations for _, requirements in processes),
        },
        "end_to_end": {
            "one_process": _entry([single], model.end_to_end_process(workload), memory),
            "pipeline": [_entry([spec], model.pipeline_process(spec, workload), memory) for spec in specs]
            if len(specs) > 1
            else [],
        },
        "fits": None,
        "remedies": [],
        "fits_with_remedies": None,
    }
    if memory is not None:
        result["fits"] = all(fits(requirements.memory.total, memory) for _, requirements in processes)
        if not result["fits"]:
            found, result["fits_with_remedies"] = remedies(model, layout, memory)
            result["remedies"] = [asdict(remedy) for remedy in found]
    return result


def _cut_by_hand(pipeline: PipelineConfig, config: transformers.PreTrainedConfig) -> tuple[BlockSpec, ...] | None:
    """The blocks whose cuts the split is to be checked at, where they are known."""
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None:
        return None  # The model will be refused.
    cuts = pipeline.boundaries
    return split_at(cuts, depth) if cuts is not None else split_evenly(depth, pipeline.num_stages)


def _entry(specs: Sequence[BlockSpec], requirements: Requirements, memory: float | None) -> dict[str, Any]:
    return {
        "stages": [spec.stage for spec in specs],
        "layers": [[spec.start, spec.stop - 1] for spec in specs],
        "parameters": requirements.parameters,
        "memory": asdict(requirements.memory),
        "total": requirements.memory.total,
        "kept_for_backward": requirements.kept,
        "operations": requirements.operations,
        "fits": None if memory is None else fits(requirements.memory.total, memory),
    }


def _bytes_per_operation(
    model: Model, workload: Workload, processes: Sequence[tuple[Sequence[BlockSpec], Requirements]]
) -> float:
    """Bytes that a boundary between processes carries for each operation of the busiest process."""
    if len(processes) == 1:
        return 0.0
    return model.message_bytes(workload) / max(requirements.operations for _, requirements in processes)


def _busiest(model: Model, layout: Layout, specs: Sequence[BlockSpec]) -> int:
    """The operations of the busiest process for a microbatch, with these blocks."""
    cuts = ",".join(str(spec.start) for spec in specs[1:])
    pipeline = replace(layout.pipeline, split=cuts) if cuts else layout.pipeline
    return max(requirements.operations for _, requirements in replace(layout, pipeline=pipeline).processes(model))

"""Two ranks that learn together, in every layout and way of computing; for `ranks`, with a file for the findings.

Each case is measured against `transformers` in one process: the loss of the task, of the reconstruction and of the
routers of each block's layers, and the gradient of every parameter. Rank 0 writes what differs, by case: nothing where
all is well. Cases of offloading are measured against the same without, bit for bit.
"""

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from datasets import Dataset
from families import tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lopt_pp.config.compute import StageConfig
from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import IGNORE_INDEX, MicrobatchSampler, TokenizedRows
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.verify import check_split
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.objectives.task import MeasuredNextToken
from lopt_pp.stage import activation_offload, optimizer_offload
from lopt_pp.stage.activation_offload import OffloadedActivations
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.stage.end_to_end import EndToEndPipeline
from lopt_pp.stage.stage import Stage

COEFFICIENT, DEPTH = 0.5, 4
LENGTHS = [12, 5, 9, 4, 7, 6]
"""Of rows; two make a microbatch. Of a step of two microbatches in each replica, the last one has no rows."""
SPECS = split_evenly(DEPTH, 2)


def config_of(family: str) -> PreTrainedConfig:
    if family == "qwen3_moe":
        return tiny_config(family, mlp_only_layers=[])
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128}
    return AutoConfig.for_model(family, **small, **experts, pad_token_id=0)


def rows() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 100, (length,), generator=draw).tolist() for length in LENGTHS]


def sampler(accumulation: int, **more: Any) -> MicrobatchSampler:
    columns = {"input_ids": rows(), "labels": rows(), "length": LENGTHS, "num_targets": [n - 1 for n in LENGTHS]}
    return MicrobatchSampler(
        TokenizedRows(Dataset.from_dict(columns), "a test", {}),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        shuffle=False,
        seed=0,
        pad_token_id=0,
        sampling="random",
        **more,
    )


@functools.cache
def expected(family: str, end_to_end: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What one process finds with `transformers` alone: losses by name, the routers' of each block; and gradients."""
    whole, config = whole_model(family), config_of(family)
    head = local_objective(blocks(family)[0], ObjectiveConfig(), 0)
    assert head is not None
    cut = SPECS[1].layers[0]
    if not end_to_end:
        whole.model.layers[cut].register_forward_pre_hook(_detach, with_kwargs=True)
    balance: Any = vars(__import__(type(whole).__module__, fromlist=["_"]))["load_balancing_loss_func"]
    found = {"right": 0.0, "loss": 0.0, "routers 0": 0.0, "routers 1": 0.0}
    num_targets, pairs = sum(LENGTHS) - len(LENGTHS), [rows()[n : n + 2] for n in range(0, len(LENGTHS), 2)]
    for pair in pairs:
        length = max(map(len, pair))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in pair])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in pair])
        output = whole(ids, attention_mask=mask, output_hidden_states=True, output_router_logits=True)
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)[:, 1:].flatten()
        task = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels, reduction="sum") / num_targets
        routers = [
            balance(output.router_logits[part], whole.num_experts, config.num_experts_per_tok, mask) / len(pairs)
            for part in (slice(0, cut), slice(cut, None))
        ]
        total = task + COEFFICIENT * sum(routers) / 2
        if not end_to_end:
            states = output.hidden_states
            batch = next(b for b in sampler(3).microbatches(0) if b.input_ids.equal(ids))
            total = total + head.weight * head(BlockOutput(states[0].detach(), states[cut], None), batch) / sum(LENGTHS)
        total.backward()
        found["loss"] += task.item()
        found["right"] += (output.logits[:, :-1].argmax(-1).flatten() == labels).sum().item()
        for number, own in enumerate(routers):
            found[f"routers {number}"] += own.item()
    named = [*whole.named_parameters(), *((f"head.{name}", own) for name, own in head.named_parameters())]
    return found, {name: own.grad for name, own in named if own.grad is not None}


def _detach(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (args[0].detach(), *args[1:]), kwargs


def whole_model(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family)).eval()


def blocks(family: str) -> list[BlockModel]:
    """Two, with the weights of the whole model, whose routers are balanced."""
    whole, config = whole_model(family), config_of(family)
    builder = BlockBuilder(type(whole), config, check_split(type(whole), config, SPECS))
    made = []
    for spec in SPECS:
        names = builder.on_meta(spec).model.state_dict()
        own = {name: tensor.clone() for name, tensor in whole.state_dict().items() if name in names}
        made.append(builder.from_state_dict(spec, own, "the whole model"))
    return made


def local(family: str, replicas: Replicas, optim: OptimConfig, **config: Any) -> list[Stage]:
    """Both stages in this process."""
    stages = []
    for block in blocks(family):
        block.balance_routers(COEFFICIENT, replicas.size)
        own = StageConfig(**config)
        objective = local_objective(block, ObjectiveConfig(), 0)
        stages.append(Stage(block, objective, optim, 10, config=own, replicas=replicas))
    return stages


def learn(stages: Sequence[Stage], **packing: Any) -> None:
    """A step, but for the optimizer's part."""
    own = sampler(2, replica=dist.get_rank(), num_replicas=2, **packing)
    batches, counts = own.microbatches(0), own.counts(0)
    for stage in stages:
        stage.begin_step(own.microbatches_with_rows(0))
    for number, batch in enumerate(batches):
        sent: list[torch.Tensor] = []
        for stage in stages:
            received = sent.pop() if sent else None
            is_last = number == len(batches) - 1
            stage.run_microbatch(batch, received, sent.append, step_count=stage.count(counts), is_last=is_last)


def compare(
    family: str, end_to_end: bool, record: dict[str, float], gradients: dict[str, torch.Tensor | None]
) -> list[str]:
    """What is not as in one process."""
    losses, named = expected(family, end_to_end)
    wrong = [
        f"{name}: {value}, not {losses[name]}" for name, value in record.items() if abs(value - losses[name]) > 1e-5
    ]
    assert gradients
    for name, own in gradients.items():
        whole = own.full_tensor() if isinstance(own, DTensor) else own
        if whole is None or not torch.allclose(whole, named[name], rtol=1e-3, atol=1e-6):
            wrong.append(f"gradient of {name}")
    return wrong


def replicated(family: str, replicas: Replicas, packing: dict[str, Any], **config: Any) -> list[str]:
    stages = local(family, replicas, OptimConfig(), **config)
    learn(stages, **packing)
    record = {f"routers {stage.index}": stage.router_record()["router_aux_loss"] for stage in stages}
    totals = torch.tensor(list(record.values()))
    dist.all_reduce(totals)
    gradients: dict[str, torch.Tensor | None] = {}
    for stage in stages:
        gradients |= {name: own.grad for name, own in stage.block.model.named_parameters()}
    assert stages[0].objective is not None
    gradients |= {f"head.{name}": own.grad for name, own in stages[0].objective.named_parameters()}
    return compare(family, False, dict(zip(record, totals.tolist(), strict=True)), gradients)


def end_to_end(family: str, packing: dict[str, Any], **config: Any) -> list[str]:
    rank = dist.get_rank()
    block = blocks(family)[rank]
    block.balance_routers(COEFFICIENT, 1)
    objective = ObjectiveConfig(train_metrics=["mean_token_accuracy"])
    pipeline = EndToEndPipeline([block], dist.group.WORLD, config=StageConfig(**config), objective=objective)
    own = sampler(3, **packing)
    assert block.balancing is not None
    block.balancing.begin(own.microbatches_with_rows(0))
    loss = pipeline.step(own.microbatches(0), own.counts(0).num_targets)
    record = {f"routers {rank}": block.balancing.record()["router_aux_loss"]}
    if loss is not None:
        assert isinstance(pipeline.task, MeasuredNextToken)
        record |= {"loss": loss.item(), "right": pipeline.task.take()["mean_token_accuracy"].item()}
    gradients = {name: parameter.grad for name, parameter in block.model.named_parameters()}
    return compare(family, True, record, gradients)


def offloaded(family: str, replicas: Replicas, **config: Any) -> list[str]:
    """Trained with state and activations in main memory, and without; on a CPU copies are made all the same."""
    states, kept = [], list[tuple[int, ...]]()
    keep = OffloadedActivations._keep

    def keeping(self: OffloadedActivations, tensor: torch.Tensor) -> Any:
        kept.append(tuple(tensor.shape))
        return keep(self, tensor)

    copying: Callable[[torch.device], object] = lambda device: OffloadedActivations(device, copies=True)  # noqa: E731
    for offloads in (False, True):
        optim = OptimConfig(learning_rate=1e-2, weight_decay=0.1, optimizer_offload=offloads)
        with (
            mock.patch.object(activation_offload, "OffloadedActivations", copying),
            mock.patch.object(OffloadedActivations, "_keep", keeping),
            mock.patch.object(optimizer_offload, "_CHUNK_BYTES", 2**13),
        ):
            stages = local(family, replicas, optim, activation_offloading=offloads, **config)
            for step in range(2):
                learn(stages)
                for stage in stages:
                    stage.step(step)
        assert bool(kept) == offloads
        states.append({f"{stage.index} {name}": own for stage in stages for name, own in stage.state().items()})
    whole = {tuple(own.shape) for own in whole_model(family).parameters()}
    wrong = [f"a weight {shape} is kept as an activation" for shape in kept if shape in whole]
    return wrong + [name for name, own in states[0].items() if not torch.equal(own, states[1][name])]


def cases() -> Iterator[tuple[str, list[str]]]:
    mesh = init_device_mesh("cpu", (2,))
    for family, packing, checkpoints in (("mixtral", {}, False), ("qwen3_moe", {"padding_free": True}, True)):
        how: dict[str, Any] = {"gradient_checkpointing": checkpoints}
        for sharded in (False, True):
            found = replicated(family, Replicas(mesh, sharded), packing, **how)
            yield f"{family}, {'FSDP2' if sharded else 'DDP'}", found
        yield f"{family}, 1F1B", end_to_end(family, packing, **how)
    for sharded, checkpoints in ((False, False), (True, False), (True, True)):
        found = offloaded("mixtral", Replicas(mesh, sharded), gradient_checkpointing=checkpoints)
        yield f"offloaded, {'FSDP2' if sharded else 'DDP'}{', checkpointing' if checkpoints else ''}", found


def main(arguments: Sequence[str]) -> int:
    dist.init_process_group("gloo")
    found = dict(cases())
    of_all: list[Any] = [None, None]
    dist.all_gather_object(of_all, found)
    if dist.get_rank() == 0:
        Path(arguments[0]).write_text(json.dumps({name: [*own, *of_all[1][name]] for name, own in found.items()}))
    dist.destroy_process_group()
    return 0

"""Readies modules and optimizers on tensors without memory, and counts what they hold."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from lopt_pp.planning.fake_tensors import make_fake
from lopt_pp.planning.memory_tracker import MemoryTracker
from lopt_pp.planning.workload import Memory, Workload
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.stage import Stage


def place(modules: Sequence[torch.nn.Module], workload: Workload, tracker: MemoryTracker) -> None:
    """Gives modules weights, and counts them."""
    for module in modules:
        make_fake(module, workload.stage.parameter_dtype)
        tracker.note([*module.parameters(), *module.buffers()], "weights")


def prepare(optimizers: Sequence[Optimizer], workload: Workload, tracker: MemoryTracker, finds_gradients: bool) -> None:
    """Makes the optimizers' state, as their first step does, and if so the gradients that a microbatch finds."""
    for optimizer in optimizers:
        _without_values(optimizer.inner)
        for group in optimizer.inner.param_groups:
            # PyTorch's optimizers see that parameters are of no plain class, and would go through them one by one.
            if group.get("foreach", True) is None:
                group["foreach"] = workload.device.type == "cuda" and not group.get("fused")
        _fill_gradients(optimizer)
        optimizer.step()
        tracker.note(list(optimizer.inner.state.values()), "optimizer")
        if finds_gradients:
            _fill_gradients(optimizer)
            tracker.note([parameter.grad for parameter in optimizer.parameters], "gradients")
        for parameter in optimizer.parameters:
            parameter.register_post_accumulate_grad_hook(lambda own: tracker.note(own.grad, "gradients"))
    tracker.forget_peak()


def _without_values(inner: torch.optim.Optimizer) -> None:
    """Readies an optimizer of bitsandbytes: its tables of values are tensors without any, and memory is not paged."""
    if hasattr(inner, "name2qmap"):
        inner.name2qmap.update({"dynamic": torch.empty(256), "udynamic": torch.empty(256)})
    if hasattr(inner, "is_paged"):
        inner.is_paged = False


def _fill_gradients(optimizer: Optimizer) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)


def on_device(memory: Memory, optimizers: Sequence[Optimizer], workload: Workload) -> Memory:
    """Without the state that is in main memory between steps; on a CPU all of it is where it was."""
    offloaded = [optimizer.offloaded for optimizer in optimizers if optimizer.offloaded is not None]
    share = max((each.share_on_device for each in offloaded), default=1.0) if workload.device.type == "cuda" else 1.0
    return replace(memory, optimizer=math.ceil(share * memory.optimizer))


def parameters_of(stage: Stage) -> Iterator[torch.nn.Parameter]:
    yield from stage.block.parameters()
    if stage.objective is not None:
        yield from stage.objective.parameters()

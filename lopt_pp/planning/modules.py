"""Readies modules and optimizers on tensors without memory, and counts what they hold."""

from collections.abc import Iterator, Sequence

import torch

from lopt_pp.planning.fake_tensors import make_fake
from lopt_pp.planning.memory_tracker import MemoryTracker
from lopt_pp.planning.workload import Workload
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
        for group in optimizer.adamw.param_groups:
            # AdamW sees that its parameters are of no plain class, and would go through them one by one.
            group["foreach"] = workload.device.type == "cuda" and not optimizer.is_fused
        _fill_gradients(optimizer)
        optimizer.step()
        tracker.note(list(optimizer.adamw.state.values()), "optimizer")
        if finds_gradients:
            _fill_gradients(optimizer)
            tracker.note([parameter.grad for parameter in optimizer.parameters], "gradients")
        for parameter in optimizer.parameters:
            parameter.register_post_accumulate_grad_hook(lambda own: tracker.note(own.grad, "gradients"))
    tracker.forget_peak()


def _fill_gradients(optimizer: Optimizer) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)


def parameters_of(stage: Stage) -> Iterator[torch.nn.Parameter]:
    yield from stage.block.parameters()
    if stage.objective is not None:
        yield from stage.objective.parameters()

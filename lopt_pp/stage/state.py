"""All that a stage's next step depends on, as plain tensors: weights, local head and optimizer state.

Of the objective, parameters that stand are left out: they come from the pretrained model again, as they did at first.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lopt_pp.errors import LoptError
from lopt_pp.stage.optimizer import Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_BLOCK = "block"
"""The prefix of the tensors that make the trained model, and are saved whether they are trained or not."""


def read_state(modules: Mapping[str, nn.Module], optimizer: Optimizer | None) -> dict[str, torch.Tensor]:
    """Copies, on the CPU, of the tensors of `modules` and of the optimizer's state of their parameters.

    Args:
        modules: by the prefix that their tensors get. Where replicas hold a share each, all must call this.
        optimizer: of their parameters; None where nothing is trained.
    """
    state = {name: _copy(tensor) for name, tensor in _tensors(modules)}
    if optimizer is None:
        return state
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            for moment, tensor in optimizer.state_of(parameter).items():
                state[f"{moment}.{prefix}.{name}"] = _copy(tensor)
    return state


def write_state(
    state: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], optimizer: Optimizer | None, steps_done: int
) -> None:
    """Puts what `read_state` gave, of any layout of the replicas, into modules and optimizer.

    A parameter of which the state has no moments has had no gradient so far, such as a block's while its head warms up.

    Raises:
        LoptError: a tensor is missing, or of another shape or dtype; nothing has been changed then.
    """
    targets = dict(_tensors(modules))
    moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters() if optimizer is not None and steps_done > 0 else ():
            if not any(f"{moment}.{prefix}.{name}" in state for moment in _MOMENTS):
                continue
            moments[parameter] = {m: _tensor(state, f"{m}.{prefix}.{name}") for m in _MOMENTS}
            for moment in ("exp_avg", "exp_avg_sq"):
                _check(f"{moment}.{prefix}.{name}", moments[parameter][moment], parameter)
    for name, target in targets.items():
        _check(name, _tensor(state, name), target)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_like(state[name], target))
    if optimizer is not None:
        own = {
            parameter: {
                "exp_avg": _like(moment["exp_avg"], parameter),
                "exp_avg_sq": _like(moment["exp_avg_sq"], parameter),
                "step": moment["step"].to(parameter.device if optimizer.is_fused else "cpu"),
            }
            for parameter, moment in moments.items()
        }
        optimizer.resume(own, steps_done)


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is saved of the modules themselves, by name."""
    for prefix, module in modules.items():
        tensors = module.state_dict()
        named = module.named_parameters(remove_duplicate=False)
        standing = {name for name, parameter in named if not parameter.requires_grad and prefix != _BLOCK}
        for name, tensor in tensors.items():
            if name not in standing:
                yield f"{prefix}.{name}", tensor


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def _like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The tensor where the target is: on its device, and the target's share of it."""
    tensor = tensor.to(target.device)
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def _tensor(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state:
        raise LoptError(f"the checkpoint has no tensor {name}")
    return state[name]


def _check(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    if tensor.shape != target.shape or tensor.dtype != target.dtype:
        raise LoptError(
            f"the checkpoint's tensor {name} is {tensor.dtype} {list(tensor.shape)}, and {target.dtype} "
            f"{list(target.shape)} is expected"
        )

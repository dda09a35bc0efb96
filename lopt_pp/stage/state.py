"""All that a stage's next step depends on, as plain tensors: weights, local head and optimizer state.

Of the objective, frozen parameters are left out: they come from the pretrained model again, as they did at first. That
they are the same is seen by a checksum.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lopt_pp.errors import LoptError
from lopt_pp.stage.optimizer import Optimizer

_BLOCK = "block"
"""The prefix of the tensors that make the trained model, and are saved whether they are trained or not."""

_NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64, bool: torch.bool}
"""How an optimizer's state that is not a tensor is saved; the dtype tells what it was."""


def read_state(modules: Mapping[str, nn.Module], optimizer: Optimizer | None) -> dict[str, torch.Tensor]:
    """Copies, on the CPU, of the tensors of `modules` and of the optimizer's state of their parameters.

    The optimizer's state has whatever names the optimizer gives it: `exp_avg.block.model.norm.weight`.

    Args:
        modules: by the prefix that their tensors get. Where replicas hold a shard each, all must call this.
        optimizer: of their parameters; None where nothing is trained.
    """
    state = {name: _copy(tensor) for name, tensor in _tensors(modules)}
    if optimizer is not None:
        for name, parameter in _parameters(modules):
            for kind, value in optimizer.state_of(parameter).items():
                state[f"{kind}.{name}"] = _saved(value)
    return state


def frozen_checksum(modules: Mapping[str, nn.Module]) -> torch.Tensor | None:
    """The SHA-256 of the frozen parameters that `read_state` leaves out, uint8 `[32]`; None where there are none.

    Args:
        modules: likewise. Where replicas hold a shard each, all must call this.
    """
    sha, is_empty = hashlib.sha256(), True
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if prefix != _BLOCK and not parameter.requires_grad:
                sha.update(f"{prefix}.{name}".encode())
                sha.update(_copy(parameter).reshape(-1).view(torch.uint8).numpy().data)
                is_empty = False
    return None if is_empty else torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


def write_state(
    state: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], optimizer: Optimizer | None, steps_done: int
) -> None:
    """Puts what `read_state` gave, of any layout of the replicas, into modules and optimizer.

    A parameter that the optimizer has no state of has had no gradient so far, such as a block's while its head warms
    up.

    Raises:
        LoptError: a tensor is missing, or of another shape or dtype; nothing has been changed then.
    """
    targets = dict(_tensors(modules))
    moments: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    if optimizer is not None and steps_done > 0:
        moments = _moments(state, dict(_parameters(modules)))
    for name, target in targets.items():
        _check(name, _tensor(state, name), target)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_like(state[name], target))
    if optimizer is not None:
        own = {
            parameter: {kind: _restored(value, parameter, optimizer) for kind, value in kinds.items()}
            for parameter, kinds in moments.items()
        }
        optimizer.resume(own, steps_done)


def _moments(
    state: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
    """The saved state of each parameter, by the optimizer's own names; nothing of one that had no gradient so far.

    Raises:
        LoptError: a part of a parameter's state is missing, or does not fit the parameter.
    """
    found: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        kind, _, name = key.partition(".")
        if (parameter := parameters.get(name)) is not None:
            found.setdefault(parameter, {})[kind] = tensor
    # All parameters of an optimizer have the same kinds of state: one that lacks one of them was damaged.
    kinds = {kind: None for own in found.values() for kind in own}
    for name, parameter in parameters.items():
        for kind in kinds if parameter in found else ():
            tensor = _tensor(found[parameter], kind, f"{kind}.{name}")
            if tensor.ndim > 0 and tensor.ndim == parameter.ndim and tensor.is_floating_point():
                _check(f"{kind}.{name}", tensor, parameter)
    return found


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters, by their names with the module's prefix."""
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            yield f"{prefix}.{name}", parameter


def _tensors(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """What is saved of the modules themselves, by name."""
    for prefix, module in modules.items():
        tensors = module.state_dict()
        named = dict(module.named_parameters(remove_duplicate=False))
        frozen = {name for name, parameter in named.items() if not parameter.requires_grad and prefix != _BLOCK}
        tied = named.keys() - dict(module.named_parameters()).keys()  # Each is there under its first name already.
        for name, tensor in tensors.items():
            if name not in frozen | tied:
                yield f"{prefix}.{name}", tensor


def _saved(value: Any) -> torch.Tensor:
    """A part of an optimizer's state as a tensor."""
    return _copy(value) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=_NUMBERS[type(value)])


def _restored(tensor: torch.Tensor, parameter: nn.Parameter, optimizer: Optimizer) -> Any:
    """The same as the optimizer had it: a number, or a tensor where it belongs."""
    if tensor.ndim == 0:
        if tensor.dtype in _NUMBERS.values():
            return tensor.item()
        # A fused kernel reads its step on the device; the others on the CPU, without waiting for the device.
        return tensor.to(parameter.device if optimizer.is_fused else "cpu")
    return _like(tensor, parameter) if tensor.shape == parameter.shape else tensor.to(parameter.device)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to("cpu", copy=True)


def _like(tensor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The tensor where the target is: on its device, and the target's shard of it."""
    tensor = tensor.to(target.device)
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)


def _tensor(state: Mapping[str, torch.Tensor], name: str, shown: str | None = None) -> torch.Tensor:
    if name not in state:
        raise LoptError(f"the checkpoint has no tensor {shown or name}")
    return state[name]


def _check(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    if tensor.shape != target.shape or tensor.dtype != target.dtype:
        raise LoptError(
            f"the checkpoint's tensor {name} is {tensor.dtype} {list(tensor.shape)}, and {target.dtype} "
            f"{list(target.shape)} is expected"
        )

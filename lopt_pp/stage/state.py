"""All that a stage's next step depends on, as plain tensors: weights, local head and optimizer state.

Of the objective, frozen parameters are left out: they come from the pretrained model again, as they did at first. That
they are the same is seen by a checksum.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lopt_pp.errors import LoptError
from lopt_pp.stage.data_parallel import joined, share_of
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.util.pinned import PinnedMemory

_BLOCK = "block"
"""The prefix of the tensors that make the trained model, and are saved whether they are trained or not."""

_NUMBERS: dict[type, torch.dtype] = {int: torch.int64, float: torch.float64, bool: torch.bool}
"""How an optimizer's state that is not a tensor is saved; the dtype tells what it was."""


class LazyState(Mapping[str, torch.Tensor]):
    """What `read_state` gave, somewhere else than in memory: a tensor is read whenever it is asked for."""

    @abstractmethod
    def described(self, name: str) -> torch.Tensor:
        """A tensor on the meta device with the shape and the dtype of the one of this name, which is not read."""


def read_state(
    modules: Mapping[str, nn.Module],
    optimizer: Optimizer | None,
    keeps: bool = True,
    pinned: PinnedMemory | None = None,
) -> dict[str, torch.Tensor]:
    """Copies, on the CPU, of the tensors of `modules` and of the optimizer's state of their parameters.

    The optimizer's state has whatever names the optimizer gives it: `exp_avg.block.model.norm.weight`.

    Args:
        modules: by the prefix that their tensors get. Where replicas hold a shard each, all must call this.
        optimizer: of their parameters; None where nothing is trained.
        keeps: whether the copies are wanted here. If not, this process only gives its shards, tensor by tensor.
        pinned: where what is on a GPU is copied to; these copies are whole when the current stream has come so far.
            None for memory of their own, where they are whole at once.
    """
    state = {}
    if keeps and pinned is not None:
        values = (value for _, value in _all(modules, optimizer) if _is_pinnable(value))
        pinned.begin([value.numel() * value.element_size() for value in values])
    for name, value in _all(modules, optimizer):
        if keeps:
            state[name] = _saved(value, pinned)
        elif isinstance(value, DTensor):
            value.full_tensor()
    return state


def _all(modules: Mapping[str, nn.Module], optimizer: Optimizer | None) -> Iterator[tuple[str, Any]]:
    """All that is saved, by name: tensors, and numbers of the optimizer's state."""
    if optimizer is None:
        yield from _tensors(modules)
        return
    parameters = dict(_parameters(modules))
    for name, value in _tensors(modules):
        yield name, optimizer.as_saved(parameters[name]) if optimizer.averages and name in parameters else value
    for name, parameter in parameters.items():
        for kind, value in optimizer.state_of(parameter).items():
            yield f"{kind}.{name}", value


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

    One tensor after another is asked for and put where it belongs; none is kept besides. A parameter that the optimizer
    has no state of has had no gradient so far, such as a block's while its head warms up.

    Raises:
        LoptError: a tensor is missing, or of another shape or dtype; nothing has been changed then.
    """
    targets = dict(_tensors(modules))
    moments: dict[nn.Parameter, dict[str, str]] = {}
    if optimizer is not None and steps_done > 0:
        moments = _moments(state, dict(_parameters(modules)), optimizer)
    for name, target in targets.items():
        _check(name, _described(state, name), target)
    with torch.no_grad():
        for name, target in targets.items():
            if isinstance(target, DTensor):
                target.to_local().copy_(share_of(state[name], target))
            else:
                target.copy_(state[name])
    if optimizer is not None:
        own = {
            parameter: {kind: _restored(kind, state[key], parameter, optimizer) for kind, key in kinds.items()}
            for parameter, kinds in moments.items()
        }
        optimizer.resume(own, steps_done)


def _moments(
    state: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[nn.Parameter, dict[str, str]]:
    """What each parameter's saved state is called, by the optimizer's own names; nothing of one without a gradient yet.

    Raises:
        LoptError: a part of a parameter's state is missing, or does not fit the parameter.
    """
    found: dict[nn.Parameter, dict[str, str]] = {}
    for key in state:
        kind, _, name = key.partition(".")
        if (parameter := parameters.get(name)) is not None:
            found.setdefault(parameter, {})[kind] = key
    # Parameters that are alike have the same kinds of state: one that lacks one of them was damaged.
    kinds: dict[object, dict[str, None]] = {}
    for parameter, own in found.items():
        kinds.setdefault(optimizer.likeness(parameter), {}).update(dict.fromkeys(own))
    for name, parameter in parameters.items():
        for kind in kinds[optimizer.likeness(parameter)] if parameter in found else ():
            tensor = _described(state, f"{kind}.{name}")
            if tensor.ndim == parameter.ndim and optimizer.has_shape_of_parameter(kind):
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


def _is_pinnable(value: Any) -> bool:
    """Whether this is copied through pinned memory: tensors on a GPU."""
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def _saved(value: Any, pinned: PinnedMemory | None) -> torch.Tensor:
    """A part of a stage's state as a tensor of its own on the CPU."""
    if pinned is not None and _is_pinnable(value):
        return pinned.copy((value.full_tensor() if isinstance(value, DTensor) else value).detach())
    return _copy(value) if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=_NUMBERS[type(value)])


def _restored(kind: str, tensor: torch.Tensor, parameter: nn.Parameter, optimizer: Optimizer) -> Any:
    """The same as the optimizer had it: a number, or a tensor where it belongs."""
    if tensor.ndim == 0:
        if tensor.dtype in _NUMBERS.values():
            return tensor.item()
        # A fused kernel reads its step on the device; the others on the CPU, without waiting for the device.
        on_host = kind == "step" and not optimizer.counts_on_device(parameter)
        return tensor.to("cpu" if on_host else parameter.device, copy=True)
    # Between steps, offloaded state is in main memory, of a sharded parameter as the share alone.
    is_offloaded = optimizer.offloaded is not None
    device = torch.device("cpu") if is_offloaded else parameter.device
    # Copied into torch's own aligned memory, so that no result hangs on where a tensor lay in a file.
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.to(device, copy=True)
    share = share_of(tensor, parameter).to("cpu" if is_offloaded else parameter.to_local().device, copy=True)
    return share if is_offloaded else joined(share, parameter, parameter.device_mesh, parameter.placements)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    whole, own = tensor.full_tensor().detach(), tensor.to_local()
    # Gathered, it is a copy already; alone, a replica has the whole for its shard.
    is_own = whole.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    return whole.to("cpu", copy=is_own)


def _described(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor with the shape and the dtype of the one that was saved."""
    if name not in state:
        raise LoptError(f"the checkpoint has no tensor {name}")
    return state.described(name) if isinstance(state, LazyState) else state[name]


def _check(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    if tensor.shape != target.shape or tensor.dtype != target.dtype:
        raise LoptError(
            f"the checkpoint's tensor {name} is {tensor.dtype} {list(tensor.shape)}, and {target.dtype} "
            f"{list(target.shape)} is expected"
        )

"""The dtypes that weights are saved in: those of the pretrained model's files, or one that the user gives."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_pp.model.shares import ShareOf
from lopt_pp.util.compat_transformers import kept_in_float32

logger = logging.getLogger(__name__)

AUTO = "auto"
"""The pretrained model's own."""


def own_dtypes(stored: Mapping[str, torch.dtype | None], places: Mapping[str, str]) -> dict[str, torch.dtype]:
    """The dtype that each parameter of a pretrained model has by its files.

    Numbers of 8 bits are never written again: they would need scales. Nothing is trained in more than 32 bits.

    Args:
        stored: of each tensor of the files; None where it is none of those that weights are trained in.
        places: the parameter that each of these goes into; one that several are fused into gets the widest dtype.
    """
    found: dict[str, torch.dtype] = {}
    for name, dtype in stored.items():
        own = torch.bfloat16 if dtype is None or dtype.itemsize < 2 else dtype
        own = torch.float32 if own.itemsize > 4 else own
        place = places[name]
        found[place] = torch.promote_types(found[place], own) if place in found else own
    return found


def most_common(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The dtype that the config of a model names whose tensors have several; None where there are none."""
    ranked = Counter(dtypes).most_common(1)
    return ranked[0][0] if ranked else None


def as_saved(
    tensors: Mapping[str, torch.Tensor], given: torch.dtype | None, own: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Weights in the dtypes that they are saved in. This is the one place where they are rounded.

    A number that float16 has not (above 65504) is kept with its whole tensor in float32, and a warning names it.

    Args:
        tensors: as they were trained.
        given: the dtype for all of them; None for the pretrained model's own.
        own: of each tensor, by the pretrained model. None of them becomes wider than it was trained.
    """
    return {name: _as_saved(name, tensor, given, own.get(name)) for name, tensor in tensors.items()}


def _as_saved(name: str, tensor: torch.Tensor, given: torch.dtype | None, own: torch.dtype | None) -> torch.Tensor:
    dtype = given or own
    if dtype is None or not tensor.is_floating_point():
        return tensor
    if given is None and dtype.itemsize > tensor.dtype.itemsize:
        return tensor
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and bool((rounded.isinf() & tensor.isfinite()).any()):
        logger.warning("%s has numbers that float16 cannot hold: it is saved in float32", name)
        return tensor.float()
    return rounded


def cast_parameters(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Moves a module to a device, and its floating-point parameters to a dtype as `transformers` loads them in it.

    Buffers keep the dtype that they were made in: rotary frequencies in bfloat16 are wrong by more than a radian at
    position 1,000. So do parameters that `transformers` holds in float32 in models of 16 bits, such as a router's
    bias. Shares are on their device already.
    """
    kept = _kept_in_float32(module) if dtype.itemsize < 4 else set()
    for parameter in module.parameters():
        # One by one, as `Module.to` does it: the whole is never there in both dtypes.
        own = dtype if parameter.is_floating_point() and parameter not in kept else parameter.dtype
        if isinstance(parameter, ShareOf):
            parameter.data, parameter.share = parameter.data.to(own), parameter.share.to(own)
        else:
            parameter.data = parameter.data.to(device, own)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _kept_in_float32(module: nn.Module) -> set[nn.Parameter]:
    return {
        parameter
        for model in module.modules()
        if isinstance(model, PreTrainedModel)
        for name, parameter in model.named_parameters()
        if any(part in name for part in kept_in_float32(model))
    }


def as_data(dtypes: Mapping[str, torch.dtype]) -> dict[str, object]:
    """Dtypes of a stage's parameters as plain data: the most common one, and the others by name."""
    common = most_common(dtypes.values())
    if common is None:
        return {}
    others = {name: _name(dtype) for name, dtype in dtypes.items() if dtype != common}
    return {"dtype": _name(common), **({"other_dtypes": others} if others else {})}


def dtype_of(name: str) -> torch.dtype:
    """The dtype that data or a flag names.

    Raises:
        ValueError: weights are not saved in it.
    """
    known = {_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if name not in known:
        raise ValueError(f"dtype {name!r}")
    return known[name]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

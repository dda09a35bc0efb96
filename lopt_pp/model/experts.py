"""Mixtures of experts under autocast: their products in its dtype, as those of all other layers."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_GROUPED = "grouped_mm"
_AUTOCAST = "lopt_autocast_grouped_mm"


def autocast_experts(model: PreTrainedModel) -> None:
    """Lets the experts of a model take part in autocast; a model without experts stays as it is.

    `transformers` multiplies all experts at once by `torch.nn.functional.grouped_mm`, which is not among the operators
    that autocast casts for: weights in float32 would be multiplied in float32. Its other implementations (`eager`,
    `batched_mm`) use operators that are.

    Sources: https://github.com/pytorch/pytorch/issues/174763 and the experts interface of `transformers`,
    https://huggingface.co/docs/transformers/experts_interface.
    """
    chosen = model.get_experts_implementation()
    if _GROUPED in chosen.values():
        names = {part: _AUTOCAST if name == _GROUPED else name for part, name in chosen.items()}
        model.set_experts_implementation(names)


class _Cast:
    """A module of experts whose own parameters, the stacked matrices and their biases, are cast."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        for name, parameter in experts.named_parameters(recurse=False):
            setattr(self, name, parameter.to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def _autocast_grouped_mm(experts: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What `transformers` does by default, with weights cast as autocast casts those of a linear layer."""
    device = hidden_states.device.type
    cast = _Cast(experts, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else experts
    result: torch.Tensor = ALL_EXPERTS_FUNCTIONS[_GROUPED](cast, hidden_states, *args, **kwargs)
    return result


ALL_EXPERTS_FUNCTIONS.register(_AUTOCAST, _autocast_grouped_mm)

"""Runs a model's own code on tensors that have no memory: shapes, dtypes and lifetimes as in a run, and no numbers.

PyTorch's fake tensors do most of it. They pass for tensors of the CPU, since without a GPU autograd and autocast know
no other device. What a GPU does otherwise is put in its place here: the attention kernel, and the chunks of the loss.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lopt_pp.objectives import CUDA_LOGITS
from lopt_pp.util import compat_torch, compat_transformers

_WIDEST_FLASH_HEAD = 256
_HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def fake_tensors(device: torch.device) -> Iterator[None]:
    """Lets all tensors be fake.

    Args:
        device: whose kernels are to be taken; the tensors are on the CPU in any case.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(compat_torch.fake_tensors())
        # The positions in a run of this trainer are those of whole rows.
        stack.enter_context(compat_transformers.no_packed_rows())
        # `make_fake` has made modules as they are to be.
        stack.enter_context(compat_torch.modules_stay())
        if device.type == "cuda":
            stack.enter_context(compat_torch.replaced_function("scaled_dot_product_attention", _attention))
            if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13.
                loss = functools.partial(_linear_cross_entropy, F.linear_cross_entropy)
                stack.enter_context(compat_torch.replaced_function("linear_cross_entropy", loss))
        yield


def make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module fake parameters and buffers in place of those that it has, which may be on the meta device.

    Args:
        module: the module.
        dtype: of the parameters that are floating-point numbers; buffers keep theirs, as in training.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # What is tied stays so.
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter not in made:
                made[parameter] = nn.Parameter(_empty(parameter, dtype), parameter.requires_grad)
            part.register_parameter(name, made[parameter])
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, _empty(buffer, buffer.dtype))


def _empty(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(like.shape, dtype=dtype if like.is_floating_point() else like.dtype)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Flash attention where the numbers have 16 bits and there is no mask; else the memory-efficient kernel; and where
    that does not know grouped heads, the plain products.

    Source: `sdp_utils.cpp` of PyTorch.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    width = query.shape[-1]
    if attn_mask is None and query.dtype in _HALF and width == value.shape[-1] <= _WIDEST_FLASH_HEAD:
        scale = width**-0.5 if scale is None else scale
        if width % 8:
            query, key, value = (F.pad(tensor, (0, -width % 8)) for tensor in (query, key, value))
        return compat_torch.flash_attention(query, key, value, dropout_p, is_causal, scale)[..., :width]
    if key.shape[1] == query.shape[1]:
        mask = _additive(attn_mask, query, key.shape[-2])
        needs_sums = torch.is_grad_enabled() and query.requires_grad
        return compat_torch.efficient_attention(query, key, value, mask, needs_sums, dropout_p, is_causal, scale)
    return compat_torch.plain_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _additive(mask: torch.Tensor | None, query: torch.Tensor, keys: int) -> torch.Tensor | None:
    """The mask as the memory-efficient kernel wants it: numbers to add, in memory that is aligned, for every head."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype), float("-inf"))
    if keys % 16:
        mask = F.pad(mask, (0, -keys % 16))[..., :keys]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], keys)


def _linear_cross_entropy(
    function: Callable[..., torch.Tensor],
    features: torch.Tensor,
    linear_weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    reduction: str = "mean",
    options: Any = None,
    **others: Any,
) -> torch.Tensor:
    """The chunked loss, in chunks as large as on a GPU; without options it is not chunked."""
    if options is None:
        return function(features, linear_weight, targets, linear_bias=linear_bias, reduction=reduction, **others)
    chunk = min(features.shape[0], max(1, CUDA_LOGITS // linear_weight.shape[0]))
    if features.dtype in _HALF and reduction == "none":
        apply: Callable[..., torch.Tensor] = _HalfLoss.apply
        return apply(features, linear_weight, linear_bias, chunk)
    others |= {"linear_bias": linear_bias, "reduction": reduction, "options": type(options)(batch_chunk_size=chunk)}
    return function(features, linear_weight, targets, **others)


class _HalfLoss(torch.autograd.Function):
    """Makes the tensors that the chunked loss in 16 bits makes on a GPU, which are others than on a CPU.

    Source: `torch.nn.modules.linear_cross_entropy` of PyTorch 2.13, reduction "none", policy "compact", CUDA.
    """

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk: int
    ) -> torch.Tensor:
        ctx.save_for_backward(features.detach(), weight.detach(), bias)
        ctx.chunk = chunk
        _, rounded = _logits(chunk, weight)
        for part in features.split(chunk):
            torch.mm(part, weight.T, out=rounded[: len(part)])
        return features.new_empty(len(features))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        features, weight, bias = ctx.saved_tensors
        logits, rounded = _logits(ctx.chunk, weight)
        of_features = torch.empty_like(features)
        # The head of an auxiliary network is frozen.
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        in_float32 = features.new_empty(ctx.chunk, features.shape[1], dtype=torch.float32)
        for part, gradient in zip(features.split(ctx.chunk), of_features.split(ctx.chunk), strict=True):
            torch.mm(part, weight.T, out=rounded[: len(part)])
            lowered = logits.to(weight.dtype)[: len(part)]
            torch.addmm(gradient, lowered, weight, alpha=-1, out=gradient)
            if of_weight is not None:
                of_weight.addmm_(lowered.T, part, alpha=-1)
        del in_float32
        return of_features, of_weight, None if bias is None else torch.zeros_like(bias), None


def _logits(chunk: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk of logits in float32, and a part of the same memory in the dtype of the weight.

    On a GPU the product goes from 16 bits to float32, which the CPU's does not.
    """
    logits = weight.new_empty(chunk, len(weight), dtype=torch.float32)
    return logits, logits.view(weight.dtype)[:, : len(weight)]

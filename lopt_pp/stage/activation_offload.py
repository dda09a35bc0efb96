"""Keeps in main memory what a forward keeps for its backward, instead of in the GPU's (`--activation_offloading`).

TRL's own, `trl.models.activation_offloading`, forgets what it keeps whenever a forward begins, and so bears one
microbatch under way only; 1F1B has several.
"""

import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lopt_pp.config.compute import StageConfig
from lopt_pp.util.compat_torch import base_and_version, is_fake

_LEAST_BYTES = 1024
"""Smaller tensors stay where they are."""


@dataclass(frozen=True)
class _Kept:
    """A tensor in main memory.

    Attributes:
        host: a dense copy; None of a tensor without memory, in a plan.
        like: on the meta device, with the shape, the strides and the dtype.
        device: where it was.
    """

    host: torch.Tensor | None
    like: torch.Tensor
    device: torch.device


def kept_for_backward(config: StageConfig, device: torch.device) -> AbstractContextManager[object]:
    """To be around a forward: says where what it keeps for its backward is. May be entered again after it was left."""
    return OffloadedActivations(device) if config.activation_offloading else nullcontext()


class OffloadedActivations(saved_tensors_hooks):
    """While it lasts, tensors on a GPU that autograd keeps go to pinned memory, and come back when backward wants them.

    Copies are on a stream of their own, in order. Weights stay, and so do small tensors; one that is kept several times
    is copied once. On a CPU there is nowhere to go, and nothing is copied.

    Args:
        device: of the tensors.
        copies: whether to copy; where it is not given, from a GPU.
    """

    def __init__(self, device: torch.device, copies: bool | None = None) -> None:
        self._device = device
        self._copies = device.type == "cuda" if copies is None else copies
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], int, _Kept]] = {}
        super().__init__(self._pack, self._unpack)

    def __enter__(self) -> None:
        self._known.clear()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._known.clear()

    def _pack(self, tensor: torch.Tensor) -> Any:
        base, version = base_and_version(tensor)
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter)
        size = tensor.numel() * tensor.element_size()
        moves = (self._copies or is_fake(tensor)) and tensor.device.type == self._device.type and not tensor.is_sparse
        if is_weight or size < _LEAST_BYTES or not moves:
            return tensor
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == version:
            return known[2]
        kept = self._keep(tensor)
        self._known[id(tensor)] = weakref.ref(tensor), version, kept
        return kept

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        like = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
        if is_fake(tensor):
            return _Kept(None, like, tensor.device)
        if self._stream is None:
            return _Kept(tensor.detach().contiguous().clone(), like, tensor.device)
        host = torch.empty(tensor.size(), dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor.detach(), non_blocking=True)
        # Its memory is given out again when the copy has been made.
        tensor.record_stream(self._stream)
        return _Kept(host, like, tensor.device)

    def _unpack(self, kept: Any) -> torch.Tensor:
        if not isinstance(kept, _Kept):
            return kept
        # Kernels may choose by strides: it comes back laid out as it was, but for repeated rows, which become rows.
        if kept.host is None or self._stream is None:
            back = _empty(kept)
            return back if kept.host is None else back.copy_(kept.host)
        with torch.cuda.stream(self._stream):
            back = _empty(kept).copy_(kept.host, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        back.record_stream(current)
        return back


def _empty(kept: _Kept) -> torch.Tensor:
    like = kept.like
    is_dense = 0 not in like.stride() and like.numel() == like.untyped_storage().nbytes() // like.element_size()
    if not is_dense:
        return torch.empty(like.size(), dtype=like.dtype, device=kept.device)
    return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=kept.device)

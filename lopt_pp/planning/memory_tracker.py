"""Counts what code does with tensors: the bytes that are alive, by what they are for, and floating-point operations.

`torch.distributed._tools.MemTracker` and `torch.utils.flop_counter.FlopCounterMode` do either. This counts alike (a
test compares them), sees into PyTorch's custom operators besides (the chunked loss is one), and costs little enough for
models of a hundred layers.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch.utils.flop_counter import flop_registry

from lopt_pp.util.compat_torch import (
    FUSED_ATTENTION,
    GROUPED_PRODUCT,
    DispatchMode,
    arguments_by_name,
    is_fake,
)

Kind = Literal["weights", "gradients", "optimizer", "activations"]

aten = torch.ops.aten


class MemoryTracker(DispatchMode):
    """Follows the storages of all tensors that are made while it is on, and of those that it is told of.

    What operators hold for a moment besides their results is not seen.

    Args:
        multiple: of bytes that memory is given out in; 512 on a GPU.

    Attributes:
        live: bytes that are alive now, by kind.
        peak: the same when there were most in all since `forget_peak`.
        operations: floating-point operations so far, a multiplication and an addition being two.
    """

    def __init__(self, multiple: int = 1) -> None:
        super().__init__()
        self.live: Counter[Kind] = Counter()
        self.peak: Counter[Kind] = Counter()
        self.operations = 0
        self._multiple = multiple
        self._known: dict[int, tuple[Kind, int, weakref.ref[Any]]] = {}
        self._total = self._highest = 0

    def note(self, tensors: Any, kind: Kind = "activations") -> None:
        """Counts the storages of these tensors that are new, and knows from now on what they are for."""
        for tensor in _tensors(tensors):
            if not tensor.is_meta:
                self._note(tensor.untyped_storage(), kind)

    def _note(self, storage: torch.UntypedStorage, kind: Kind) -> None:
        key = id(storage)  # The same for as long as it is alive, whoever asks a tensor for it.
        if key not in self._known:
            size = -(-storage.nbytes() // self._multiple) * self._multiple
            self._known[key] = kind, size, weakref.ref(storage, lambda _: self._forget(key))
            self.live[kind] += size
            self._total += size
        elif kind != "activations":
            before, size, reference = self._known[key]
            self._known[key] = kind, size, reference
            self.live[before] -= size
            self.live[kind] += size
        if self._total > self._highest:
            self._highest, self.peak = self._total, self.live.copy()

    def _forget(self, key: int) -> None:
        kind, size, _ = self._known.pop(key)
        self.live[kind] -= size
        self._total -= size

    def forget_peak(self) -> None:
        """Lets `peak` begin anew from what is alive now."""
        self._highest, self.peak = self._total, self.live.copy()

    def run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if args and is_fake(args[0]) and (shape := _fake_shape(function, *args, **kwargs)) is not None:
            result = args[0].new_empty(shape)
        else:
            result = function(*args, **kwargs)
        self.note(result)
        self.operations += _operations(function, args, kwargs, result)
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in lists, tuples and dictionaries of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _fake_shape(function: Any, *args: Any, **kwargs: Any) -> tuple[int, ...] | None:
    """The shape of a result that fake tensors are at a loss about; None of any other.

    Of what a mask chooses, as if all of it were true: the rows are full. Of products of experts in 32 bits, which only
    real tensors have.
    """
    if function is aten.index.Tensor:
        first, *others = args[1]
        if first is None or first.dtype != torch.bool or others:
            return None
        return (first.numel(), *args[0].shape[first.ndim :])
    if function.overloadpacket is GROUPED_PRODUCT and args[0].dtype == torch.float32:
        left, right = args[:2]
        if left.ndim == right.ndim == 2:
            return len(kwargs.get("offs", args[2] if len(args) > 2 else ())), len(left), right.shape[1]
        return (
            (*left.shape[:-1], right.shape[-1]) if left.ndim < 3 or right.ndim == 3 else (left.shape[1], right.shape[1])
        )
    return None


def _operations(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    packet: Any = getattr(function, "overloadpacket", None)
    if packet in FUSED_ATTENTION:
        return _attention(function, args, kwargs, is_backward=FUSED_ATTENTION[packet])
    if packet is GROUPED_PRODUCT:
        return _grouped(*args[:2])
    formula = flop_registry.get(_IN_PLACE.get(packet, packet))
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


_IN_PLACE: dict[Any, Any] = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""Products that have no formula of their own."""


def _attention(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], is_backward: bool) -> int:
    """Two products forward, five backward, since a fused kernel makes the scores again; of a causal one the half that
    its mask leaves."""
    given = arguments_by_name(function, args, kwargs)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    rows, heads, tokens, width = query.shape
    products = 3 * width + 2 * value.shape[-1] if is_backward else width + value.shape[-1]
    whole = 2 * rows * heads * tokens * key.shape[-2] * products
    return whole // 2 if given.get("is_causal") else whole


def _grouped(left: torch.Tensor, right: torch.Tensor) -> int:
    """Of products of slices: each row of `left` with one matrix of `right`, or columns with rows in groups."""
    return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]

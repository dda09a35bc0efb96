"""Keeps an optimizer's state in main memory: each step brings it to the device a few parameters at a time.

The step itself is the optimizer's own, on the device, so its bits are those of a run whose state stays there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lopt_pp.stage.data_parallel import joined
from lopt_pp.stage.optimizer_kinds import Group
from lopt_pp.util.pinned import PinnedMemory

_CHUNK_BYTES = 2**26
"""Of parameters whose state is on the device at once; larger parameters go alone."""

_CHUNKS_AT_ONCE = 3
"""One that is stepped over, the next on its way to the device, and the one before on its way back."""


class OffloadedState:
    """The state of one optimizer, between its steps in main memory: of a GPU's, in pinned memory.

    Of a sharded parameter it is this process's share. On a CPU all stays where it is, and only the order is this one's.

    Args:
        inner: the optimizer; steps over different parameters do not depend on each other.
        device: of the parameters.
    """

    def __init__(self, inner: torch.optim.Optimizer, device: torch.device) -> None:
        self._inner = inner
        self._device = device
        self._chunks = list(_chunks([p for group in inner.param_groups for p in group["params"]]))
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._memory: dict[nn.Parameter, PinnedMemory] = {}
        self._pieces: dict[tuple[nn.Parameter, str], torch.Tensor] = {}

    def step(self) -> None:
        """Makes the optimizer's step. On a GPU copies to and fro run beside it; the host waits for nothing."""
        current = torch.cuda.current_stream(self._device) if self._copies is not None else None
        if self._copies is not None and current is not None:
            self._copies.wait_stream(current)
        arriving = self._fetch(self._chunks[0])
        for number, chunk in enumerate(self._chunks):
            if self._copies is not None and current is not None:
                current.wait_stream(self._copies)
            for parameter, tensors in arriving.items():
                self._inner.state[parameter] |= tensors
            arriving = self._fetch(self._chunks[number + 1]) if number + 1 < len(self._chunks) else {}
            with _only(self._inner.param_groups, chunk):
                self._inner.step()
            if self._copies is not None and current is not None:
                self._copies.wait_stream(current)
            self._put_away(chunk)

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter: of a sharded one as tensors that are sharded alike, on the device."""
        if self._copies is not None:
            self._copies.synchronize()
        state = self._inner.state.get(parameter, {})
        return {name: self._on_device(parameter, value) if _moves(value) else value for name, value in state.items()}

    @property
    def share_on_device(self) -> float:
        """Of the state, what is on the device at most during a step."""
        sizes = [sum(p.numel() for p in chunk) for chunk in self._chunks]
        most = max(sum(sizes[first : first + _CHUNKS_AT_ONCE]) for first in range(len(sizes)))
        return most / sum(sizes)

    def _fetch(self, chunk: Sequence[nn.Parameter]) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
        """Begins to bring the state of some parameters to the device."""
        with _on(self._copies):
            return {
                parameter: {
                    name: self._on_device(parameter, value)
                    for name, value in self._inner.state[parameter].items()
                    if _moves(value)
                }
                for parameter in chunk
                if parameter in self._inner.state
            }

    def _on_device(self, parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
        if self._copies is not None and not value.is_cuda:
            value = value.to(self._device, non_blocking=True)
            value.record_stream(torch.cuda.current_stream(self._device))
        if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
            return value
        return joined(value, parameter, parameter.device_mesh, parameter.placements)

    def _put_away(self, chunk: Sequence[nn.Parameter]) -> None:
        """Begins to bring it back."""
        with _on(self._copies):
            for parameter in chunk:
                state = self._inner.state.get(parameter, {})
                for name, value in list(state.items()):
                    if _moves(value):
                        state[name] = self._kept(parameter, name, value, state)

    def _kept(self, parameter: nn.Parameter, name: str, value: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        own = _local(value)
        if self._copies is None:
            return own
        own.record_stream(self._copies)
        if (piece := self._pieces.get((parameter, name))) is not None:
            return piece.copy_(own, non_blocking=True)
        if parameter not in self._memory:
            self._memory[parameter] = memory = PinnedMemory()
            memory.begin([_local(each).numel() * each.element_size() for each in filter(_moves, state.values())])
        self._pieces[parameter, name] = piece = self._memory[parameter].copy(own)
        return piece


def _moves(value: Any) -> bool:
    """Whether a part of a state goes to and fro: counts, which are one number each, stay where they are read."""
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _chunks(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    chunk: list[nn.Parameter] = []
    for parameter in parameters:
        size = sum(each.numel() * each.element_size() for each in [*chunk, parameter])
        if chunk and size > _CHUNK_BYTES:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk


@contextmanager
def _only(groups: Sequence[Group], chunk: Sequence[nn.Parameter]) -> Iterator[None]:
    """While it lasts, an optimizer's groups have these parameters alone."""
    whole, chosen = [group["params"] for group in groups], set(chunk)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in chosen]
    try:
        yield
    finally:
        for group, parameters in zip(groups, whole, strict=True):
            group["params"] = parameters


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield

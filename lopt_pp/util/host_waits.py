"""Finds what would make the host wait for its GPU; on a CPU by the operators, on a GPU by PyTorch's own word.

A wait empties the GPU's queue: nothing new is launched until the host has read the value. So from a step's first
microbatch to its optimizer step there must be none.
"""

import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from lopt_pp.util import compat_torch
from lopt_pp.util.compat_torch import DispatchMode

_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
"""The operators that give Python a value of a tensor; `item()`, `bool(...)` and `if tensor:` are mostly the first."""

_SIZES = {
    "nonzero",
    "argwhere",
    "masked_select",
    "bincount",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "unique_dim_consecutive",
}
"""Those that give a tensor whose shape depends on values."""

_INDEXES = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
"""Those that take indices, which may be boolean."""

_COPIES: dict[Any, str] = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.cpu: "cpu",
    torch.Tensor.cuda: "cuda",
}

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OWN = os.sep + "lopt_pp" + os.sep
_OWN_FILES = {__file__, compat_torch.__file__}
"""Through which every operator comes here."""
_SHOWN = 3
"""Places in the code that a wait is known by, from the innermost."""

_host = threading.local()


class HostWait(NamedTuple):
    """Something that waited, or would have.

    Attributes:
        operator: of PyTorch, such as `aten.nonzero`.
        place: in the code, from the innermost: `next_token.py:46 < stage.py:190`.
    """

    operator: str
    place: str


class HostWaits:
    """Notes what makes the host wait for the device, for as long as the context lasts.

    On a GPU it records what `torch.cuda.set_sync_debug_mode` warns of, in all threads. On a CPU nothing waits for a
    device, so it sees the operators of this thread and its backward that would: those that read a value (`item`,
    `if tensor:`, `tolist`), those whose result's shape depends on values (`nonzero`, boolean indices), and copies
    between devices by the package's own code that are not `non_blocking`. There every tensor is taken for one of the
    device's, but within `on_host`.

        with HostWaits(stage.device) as waits:
            stage.run_microbatch(...)
        print(waits.found)

    Args:
        device: that the code in the context computes on.

    Attributes:
        found: what was found, in order.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_gpu = torch.device(device).type == "cuda"
        self._stack = ExitStack()
        self.found: list[HostWait] = []

    def __enter__(self) -> "HostWaits":
        if self._on_gpu:
            self._stack.enter_context(self._warned())
        else:
            self._stack.enter_context(_Operators(self._note))
            self._stack.enter_context(_Functions(self._note))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _note(self, operator: str) -> None:
        if not getattr(_host, "depth", 0):
            self.found.append(HostWait(operator, _place()))

    @contextmanager
    def _warned(self) -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                place = f"{os.path.basename(warning.filename)}:{warning.lineno}"
                self.found.append(HostWait("CUDA synchronization", place))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextmanager
def on_host() -> Iterator[None]:
    """For reading a tensor that is on the CPU on every machine: on a CPU `HostWaits` cannot know it from another."""
    _host.depth = getattr(_host, "depth", 0) + 1
    try:
        yield
    finally:
        _host.depth -= 1


class _Operators(DispatchMode):
    """Sees the operators; also those of backward, where no Python code is."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._note = note

    def run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if waits(function, args, kwargs):
            self._note(str(getattr(function, "overloadpacket", function)))
        return function(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """Sees what is not an operator on a CPU: the copies to and from the device."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _COPIES and not _is_non_blocking(args, kwargs):
            self._note(_COPIES[function])
        # Elsewhere than in own code it mostly moves nothing: libraries say `x.to(y.device)` to be sure.
        elif (
            function is torch.Tensor.to
            and _names_device(args[1:], kwargs)
            and not _is_non_blocking(args, kwargs)
            and _OWN in _caller()
        ):
            self._note("to")
        return function(*args, **kwargs)


def waits(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator would make the host wait for a GPU that has its tensors.

    Args:
        operator: of `torch.ops`.
        args: that it is called with.
        kwargs: likewise.
    """
    space, _, name = str(getattr(operator, "overloadpacket", operator)).partition(".")
    if space != "aten":
        return False
    if name in _READS or name in _SIZES:
        return True
    if name == "repeat_interleave":
        # With one number for all the shape is known.
        return kwargs.get("output_size") is None and not (len(args) > 1 and isinstance(args[1], int))
    if name not in _INDEXES:
        return False
    masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    # One value is put where a mask is True by `masked_fill`.
    return bool(masks) and (len(args) < 3 or args[2].numel() > 1)


def _names_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("device") is not None or any(isinstance(value, torch.device | str) for value in args)


def _is_non_blocking(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return kwargs.get("non_blocking") is True or any(value is True for value in args[1:])


def _caller() -> str:
    """The file that the function is called from, PyTorch's own included."""
    return next((name for name, _ in _frames(but_torch=False)), "")


def _place() -> str:
    frames = list(_frames())
    # In backward, and in libraries, the innermost alone does not say what of the package's own code it is about.
    shown = [frame for number, frame in enumerate(frames) if number == 0 or _OWN in frame[0]]
    return " < ".join(f"{os.path.basename(name)}:{line}" for name, line in shown[:_SHOWN])


def _frames(but_torch: bool = True) -> Iterator[tuple[str, int]]:
    """The file and line of each caller outside of this file, and of PyTorch, from the innermost."""
    for frame, line in traceback.walk_stack(None):
        name = frame.f_code.co_filename
        if name not in _OWN_FILES and not name.startswith("<") and not (but_torch and name.startswith(_TORCH)):
            yield name, line

"""The memory that a process holds: now, at its peak, and in tensors that autograd keeps for backward."""

import ctypes
import gc
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from lopt_pp.metrics.clock import peak_memory

_PROCESS = Path("/proc/self")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def reason_not_possible(device: torch.device) -> str | None:
    """Why the memory of processes on this device cannot be measured here; None where it can."""
    if device.type == "cuda":
        return None if torch.cuda.device_count() else "there is no GPU that PyTorch can use"
    if sys.platform != "linux":
        return "resident memory is measured on Linux only"
    try:
        (_PROCESS / "clear_refs").write_text("5")
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"it takes glibc and a kernel that resets a process's peak: {error}"
    return None


def give_back_at_once() -> None:
    """Makes this process's resident memory follow what it frees, which glibc would keep for later.

    From here on a block of 64 KiB or more is a mapping of its own, gone when it is freed.
    """
    libc = ctypes.CDLL(None)
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 2**16), (_M_TRIM_THRESHOLD, 2**17)):
        if libc.mallopt(option, value) != 1:
            raise RuntimeError(f"mallopt({option}, {value}) failed")


class MemoryTracker:
    """Of this process: bytes resident on a CPU, or allocated on its GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def current(self) -> int:
        """What is held now, garbage aside."""
        gc.collect()
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        ctypes.CDLL(None).malloc_trim(0)
        # Counted page by page; the counter in `status` may lag behind by some dozen pages.
        lines = (_PROCESS / "smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Rss:")) * 1024

    def reset_peak(self) -> None:
        """Lets `peak` begin anew from what is held now."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            (_PROCESS / "clear_refs").write_text("5")

    def peak(self) -> int:
        """The most that was held since `reset_peak`."""
        return peak_memory(self._device)


class SavedTensors:
    """Counts the bytes that autograd keeps for backward while the context lasts: each storage once.

    Two things do not pass through here: what `torch.utils.checkpoint` keeps, and what `linear_cross_entropy` keeps, the
    gradients of its inputs, which it makes in forward.

    Args:
        apart: tensors that do not count, such as parameters.
    """

    def __init__(self, apart: Iterable[torch.Tensor]) -> None:
        self._apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)
        self._number: Counter[int] = Counter()
        self._bytes = 0
        self.peak = 0

    def __enter__(self) -> "SavedTensors":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> "_Kept":
        return _Kept(self, tensor)

    def add(self, storage: torch.UntypedStorage, number: int) -> None:
        """One more tensor of this storage is kept, or (-1) one less."""
        address = storage.data_ptr()
        if address in self._apart:
            return
        before = self._number[address]
        self._number[address] += number
        self._bytes += storage.nbytes() * ((before + number > 0) - (before > 0))
        self.peak = max(self.peak, self._bytes)


class _Kept:
    """A saved tensor, until autograd lets go of it."""

    def __init__(self, count: SavedTensors, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._count = count
        count.add(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._count.add(self.tensor.untyped_storage(), -1)

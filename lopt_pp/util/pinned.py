"""Main memory that a GPU copies into by itself, while host and GPU go on with their work."""

import logging
import mmap
from contextlib import suppress

import torch

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all GPUs of the process."""


class PinnedMemory:
    """One stretch of pinned memory, taken piece by piece for a copy, and again from its beginning for the next.

    It is registered with CUDA rather than allocated by PyTorch, which rounds up to powers of two: a state of 70 GB
    would pin 128. Pinning takes about as long as writing to all of it, so it is kept. Where the system does not let it
    be pinned, it is ordinary memory, and copies into it wait for the GPU.
    """

    def __init__(self) -> None:
        self._bytes: torch.Tensor | None = None
        self._is_pinned = False
        self._used = 0

    def begin(self, sizes: list[int]) -> None:
        """Makes room for pieces of these sizes in bytes; what was taken before is free again."""
        needed = sum(map(_aligned, sizes))
        self._used = 0
        if self._bytes is not None and self._bytes.numel() >= needed:
            return
        if self._bytes is not None and self._is_pinned:
            _unregister(self._bytes)
        self._bytes = None  # First, so that the two are never there at once.
        # Anonymous pages: nobody else's memory is on the first or the last of them, which CUDA would refuse.
        self._bytes = torch.frombuffer(mmap.mmap(-1, max(needed, 1)), dtype=torch.uint8)
        self._is_pinned = _register(self._bytes)
        if not self._is_pinned:
            logger.warning(
                "%d bytes of main memory cannot be pinned (`ulimit -l` limits it): training waits while a checkpoint "
                "is copied",
                needed,
            )

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor in the next piece. It is whole when the current stream has come so far."""
        assert self._bytes is not None
        size = tensor.numel() * tensor.element_size()
        piece = self._bytes[self._used : self._used + size].view(tensor.dtype).view(tensor.shape)
        self._used += _aligned(size)
        return piece.copy_(tensor, non_blocking=self._is_pinned)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _register(memory: torch.Tensor) -> bool:
    # As torch.distributed.checkpoint does it.
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)) == 0:
        return True
    # CUDA keeps the error for whoever asks next, and PyTorch asks after each launch of a kernel. It is asked here.
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False


def _unregister(memory: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

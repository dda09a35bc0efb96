"""`--full_determinism`: the same bits from the same run on the same GPUs, at some cost in speed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lopt_pp.errors import LoptError, first_line

_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""What libraries read when they begin to compute: cuBLAS, and flash attention (the package of that name). What the user
has set stays. `transformers.enable_full_determinism` sets `CUDA_LAUNCH_BLOCKING` as well, which PyTorch has not needed
since CUDA 10.2: with it, each posted receive would hold up the computation."""


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """While it lasts, GPUs may round what enters matrix products in float32 to TF32, where that is asked for."""
    before = torch.backends.cuda.matmul.allow_tf32
    if enabled:
        torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        if enabled:
            torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def full_determinism(enabled: bool) -> Iterator[None]:
    """While it lasts, PyTorch takes deterministic kernels only; afterwards its settings are as they were.

    To be entered before anything is computed. On a CPU all kernels that are used here are deterministic anyway.
    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html

    Raises:
        LoptError: an operator of the model has no deterministic kernel.
    """
    if not enabled:
        yield
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = torch.get_deterministic_debug_mode(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # Nothing is read here before it is written, and filling what is to receive messages takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise LoptError(
            f"--full_determinism: the model has an operator without a deterministic form: {first_line(error)} Another "
            f"--attn_implementation (sdpa, eager) may help; or leave the flag out"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]

"""All that reaches into private parts of PyTorch, or puts something in the place of a part of it.

Each item says what it reaches into, why there is no public way, and where it was seen to work. `test_compat_torch.py`
tries each of them, and `test_private.py` sees that no other file does such a thing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from lopt_pp.util.patching import replaced

aten = torch.ops.aten


def nccl_options(timeout: timedelta, max_ctas: int) -> Any:
    """Options of a process group of NCCL's, whose kernels go first and take few of the GPU's multiprocessors.

    Private: the attribute `_timeout`. PyTorch sets it from the `timeout` that `new_group` is given, and warns where the
    options have another one, as new ones do. Seen in 2.13; 2.11 and 2.12 have it.

    Args:
        timeout: of the group, the same as `new_group` is given.
        max_ctas: thread blocks, each of which occupies a multiprocessor, of a transfer at most.
    """
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = max_ctas
    options._timeout = timeout
    return options


class DispatchMode(TorchDispatchMode):
    """Sees every operator that runs while it is on, those within operators that are written in Python included.

    A subclass has `run`, which runs one.

    Private: the module `torch.utils._python_dispatch`. PyTorch's own notes on extending it import the class from there,
    and there is no other name. Seen in 2.13; 2.11 and 2.14 have it in the same place.
    """

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (inside := python_code(function)) is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Runs an operator, and gives what it gives."""
        return function(*args, **kwargs)


def fake_tensors() -> AbstractContextManager[object]:
    """Lets all tensors that are made be fake: with a shape and a dtype, and without memory.

    Private: `torch._subclasses.fake_tensor`. Tensors on the meta device, which are public, say that they are on that
    device, and models ask where they are. Seen in 2.13; 2.11 and 2.14 have it in the same place.
    """
    return FakeTensorMode()


def real_tensors() -> AbstractContextManager[object]:
    """Lets tensors be real again, within `fake_tensors`.

    Private: `torch._subclasses.fake_tensor`, as above; so are the versions.
    """
    return unset_fake_temporarily()


def is_fake(value: object) -> bool:
    """Whether this is a tensor of `fake_tensors`.

    Private: `torch._subclasses.fake_tensor`, as above; so are the versions.
    """
    return isinstance(value, FakeTensor)


def python_code(operator: Any) -> Callable[..., Any] | None:
    """What an operator that is written in Python (by `torch.library.custom_op`) runs; None of any other operator.

    Private: the table `OPDEFS` and the attribute `_init_fn`. An operator is opaque to a `DispatchMode`, and PyTorch
    does not tell what is in it: the chunked loss is one. Seen in 2.13; 2.11 and 2.14 have them in the same place.
    """
    schema = getattr(operator, "_schema", None)
    definition = None if schema is None else OPDEFS.get(schema.name)
    return None if definition is None else definition._init_fn


def arguments_by_name(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that an operator is called with, by the names that its schema gives them; defaults are left out.

    Private: the attribute `_schema`, the only one that has the names. Seen in 2.13; 2.11 and 2.14 have it.
    """
    names = (argument.name for argument in operator._schema.arguments)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


FUSED_ATTENTION: dict[Any, bool] = {
    getattr(aten, name + suffix): is_backward
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    for suffix, is_backward in (("", False), ("_backward", True))
}
"""The operators that are kernels of attention, with whether they are of a backward.

Private: their names. `scaled_dot_product_attention` chooses one, and a `DispatchMode` sees the chosen one. Seen in
2.13.
"""

GROUPED_PRODUCT: Any = getattr(aten, "_grouped_mm", None)
"""The operator that multiplies by the matrices of several experts at once; None in a version without it.

Private: its name. It is what the public `torch.nn.functional.grouped_mm` runs, and what a `DispatchMode` sees. Seen in
2.13.
"""


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, is_causal: bool, scale: float
) -> torch.Tensor:
    """Attention by the flash kernel of a GPU; fake tensors take it on the CPU as well.

    Private: the name of the kernel. The public `torch.nn.attention.sdpa_kernel` chooses among the kernels of the device
    that tensors are on, and a plan for a GPU is made without one. Seen in 2.13.
    """
    return aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale)[0]


def efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    needs_sums: bool,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Attention by the memory-efficient kernel of a GPU; fake tensors take it on the CPU as well.

    Args:
        query: `[sequences, heads, tokens, width]`, as `key` and `value` are.
        key: as above.
        value: as above.
        mask: to add to the scores.
        needs_sums: whether the sums that a backward needs are kept.
        dropout: probability.
        is_causal: whether later tokens are hidden.
        scale: of the scores; None is that of the width.

    Private: the name of the kernel, as of `flash_attention`. Seen in 2.13.
    """
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, mask, needs_sums, dropout, is_causal, scale=scale)[0]


def plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Attention by plain products, as where no kernel fits.

    Private: the name of the operator, as of `flash_attention`. Seen in 2.13.
    """
    plain = aten._scaled_dot_product_attention_math
    return plain(query, key, value, mask, dropout, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]


def replaced_function(name: str, function: Callable[..., Any]) -> AbstractContextManager[None]:
    """Puts another function in the place of one of `torch.nn.functional`, for all who call it by that module.

    A patch: the model's own code is to run, and it calls `scaled_dot_product_attention`, which would take the CPU's
    kernel where a GPU's is asked for. A `torch.overrides.TorchFunctionMode`, which is public, sees the calls as well,
    but not those within `Tensor.backward`, in which gradient checkpointing runs layers again. Seen in 2.13, with
    transformers 5.23.
    """
    return replaced(F, name, function)


def base_and_version(tensor: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    """The tensor that another one is a view of, if any, and how often the latter's memory has been written to.

    Private: the attributes `_base` and `_version`, which have no other names. PyTorch's notes on autograd name both.
    Seen in 2.11 and 2.13.
    """
    return tensor._base, tensor._version


@contextmanager
def unprofiled() -> Iterator[None]:
    """While it lasts, the profiler sees nothing of this thread.

    A transfer that the profiler has seen begin and that ends after it was stopped ends the process by a segmentation
    fault: gloo tells an end to a record that is gone. Of others there is no public way to say so.

    Private: `torch._C._autograd._enable_record_function`. Seen in 2.13.
    """
    if not torch.autograd.profiler._is_profiler_enabled:
        yield
        return
    torch._C._autograd._enable_record_function(False)
    try:
        yield
    finally:
        torch._C._autograd._enable_record_function(True)


def memory_history(records: bool, path: str | None = None) -> None:
    """Begins to record what memory of the GPU is given out and freed, or ends it and writes it to a file.

    Private: `torch.cuda.memory._record_memory_history` and `_dump_snapshot`. PyTorch documents both, under these names.
    Seen in 2.11 and 2.13.
    """
    if path is not None:
        torch.cuda.memory._dump_snapshot(path)
    torch.cuda.memory._record_memory_history("all" if records else None, max_entries=1_000_000)


def modules_stay() -> AbstractContextManager[None]:
    """Lets `Module.to` do nothing: modules stay where they are, and as they are.

    A patch: `to` swaps the tensors of a module whose parameters are fake, and PyTorch refuses to swap a tensor that is
    weakly referred to, as fake ones are. Seen in 2.13.
    """
    return replaced(nn.Module, "to", lambda module, *_, **__: module)


def replaced_forward(
    module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> AbstractContextManager[None]:
    """Has a module that belongs to a model run another `forward`, made of its own, while the context lasts.

    A patch: a hook, which is public, sees what goes in and out, but cannot keep `forward` from running; and another
    module in the place of this one would lack the attributes that the model asks its layers for. Seen in 2.13.

    Args:
        module: of the model.
        make: is given its `forward`, and gives the other one.
    """
    return replaced(module, "forward", make(module.forward))


def hooks_of(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What was registered on a module and its own parameters to run in forward or backward: how it is called, and it.

    Private: the attributes that hold hooks, of modules and of parameters; there is no public way to list them. Seen in
    2.11 and 2.13.
    """
    for own, kinds in ((module, _MODULE_HOOKS), *((each, _TENSOR_HOOKS) for each in module.parameters(recurse=False))):
        for attribute, kind in kinds.items():
            for hook in (getattr(own, attribute, None) or {}).values():
                yield kind, hook


_MODULE_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_TENSOR_HOOKS = {"_backward_hooks": "hook on a gradient", "_post_accumulate_grad_hooks": "hook on a gradient"}

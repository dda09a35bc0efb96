"""All that reaches into private parts of `transformers`, or puts something in the place of a part of it.

Each item says what it reaches into, why there is no public way, and where it was seen to work. The test
`test_compat_transformers.py` tries each of them, and `test_private.py` sees that no other file does such a thing.
"""

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, tzinfo
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils, modeling_flash_attention_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import cached_file, chat_template_utils

from lopt_pp.util.patching import replaced


def no_packed_rows() -> AbstractContextManager[None]:
    """Lets no model infer from positions that several rows share a sequence: each row has its own.

    A patch of `masking_utils.find_packed_sequence_indices`: fake tensors pass for traced ones, of which `transformers`
    cannot read the positions; it would make masks that a run does not need. Seen in 5.23 and 5.24.
    """
    return replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


@contextmanager
def packing_known(share: bool) -> Iterator[None]:
    """Tells models, in this thread, whether rows share sequences, so that they need not read the positions for it.

    On a GPU they would wait there for its queue, in each microbatch, and with flash attention in each layer.

    Replaces `masking_utils.find_packed_sequence_indices` and `modeling_flash_attention_utils._is_packed_sequence` for
    good, by functions that do what these do where nothing was told. There is no argument: a mask that is given turns
    the question off, but families take masks of different kinds. Seen in 5.23 and 5.24.

    Args:
        share: whether positions start anew within a sequence somewhere.
    """
    before = getattr(_told, "share", None)
    _told.share = share
    try:
        yield
    finally:
        _told.share = before


def recompute_as_told() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: what runs again in backward, in another thread, knows of packing what it knew.

    `transformers` hands its keyword arguments on. Seen in 5.23 and 5.24.
    """
    share = getattr(_told, "share", None)
    return nullcontext(), nullcontext() if share is None else packing_known(share)


_told = threading.local()
_find_packed = masking_utils.find_packed_sequence_indices
_is_packed: Callable[..., object] = modeling_flash_attention_utils._is_packed_sequence


def _find_packed_as_told(position_ids: torch.Tensor) -> torch.Tensor | None:
    share = getattr(_told, "share", None)
    if share is None:
        return _find_packed(position_ids)
    # The number of the row that each token belongs to.
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1) if share else None


def _is_packed_as_told(position_ids: torch.Tensor | None, batch_size: int) -> object:
    share = getattr(_told, "share", None)
    if share is None or position_ids is None:
        return _is_packed(position_ids, batch_size)
    return share and batch_size == 1 and position_ids.shape[-1] > 1


masking_utils.find_packed_sequence_indices = _find_packed_as_told
modeling_flash_attention_utils._is_packed_sequence = _is_packed_as_told


@contextmanager
def templates_see(moment: datetime) -> Iterator[None]:
    """Lets chat templates take another moment for now; for one thread at a time, the others wait.

    A patch of the `datetime` of `chat_template_utils`, of which the global function `strftime_now` of all templates is
    made. It cannot be given as a variable of the template: those are made plain data, and a function is none. Seen in
    5.23 and 5.24.
    """

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return moment

    with _clock, replaced(chat_template_utils, "datetime", Clock):
        yield


_clock = threading.Lock()


def attention_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention that a model of this config will have; None where it is left to `transformers`.

    Private: the property `_attn_implementation`. The public `attn_implementation` is an argument only: of the config,
    or of whatever makes a model. Seen in 5.23 and 5.24.
    """
    return getattr(config, "_attn_implementation", None)


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Gives a config that there is already another attention.

    Private: the property `_attn_implementation`. The public `set_attn_implementation` is a model's, which would have
    to be made with the first one before. Seen in 5.23 and 5.24.
    """
    config._attn_implementation = name


def kept_in_float32(model: PreTrainedModel) -> Iterable[str]:
    """Parts of the names of the parameters that stay in float32 where a model is loaded in 16 bits.

    Private: the attribute `_keep_in_fp32_modules_strict`. `from_pretrained`, which heeds it, reads the files once more.
    (`_keep_in_fp32_modules` is for float16 alone.) Seen in 5.17 and 5.23.
    """
    return model._keep_in_fp32_modules_strict or ()


def find_file(name_or_path: str, file_name: str, revision: str) -> str | None:
    """The local path of a model's file, fetched from the hub if need be; None where the model has no such file.

    Private: the argument `_raise_exceptions_for_missing_entries` of `cached_file`. Without it a file that is missing
    and a hub that does not answer raise the same error. Seen in 5.23 and 5.24.

    Raises:
        OSError: the hub does not answer, or does not have the model.
    """
    return cached_file(name_or_path, file_name, revision=revision, _raise_exceptions_for_missing_entries=False)


def pass_for(own: type[PreTrainedModel], original: type[PreTrainedModel]) -> None:
    """Has a subclass of a model's class loaded and saved as that class is.

    Reaches into how `transformers` finds the conversions of old checkpoints: by the class's name, and of classes from
    its own modules only. There is no way to tell it of another class. Seen in 5.23 and 5.24.
    """
    own.__name__ = own.__qualname__ = original.__name__
    own.__module__ = original.__module__


class Deferred:
    """A tensor for the `state_dict` of `from_pretrained` that is read only when its place in the model is filled.

    Reaches into how `from_pretrained` takes the tensors of files: it indexes each (`tensor[...]`), which reads it, and
    moves what comes of that (`to(device, dtype)`). Of a `state_dict` it takes tensors that are there already, and
    of files it reads the whole. Seen in 5.17 to 5.24.

    Args:
        read: gives the tensor on the device where it is to be, in a dtype, or as it is stored.
    """

    def __init__(self, read: Callable[[torch.dtype | None], torch.Tensor]) -> None:
        self._read = read

    def __getitem__(self, index: object) -> "Deferred":
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._read(dtype)


@contextmanager
def one_after_another() -> Iterator[None]:
    """Has `from_pretrained` read a tensor when it puts it into the model, and none before.

    Four threads would run ahead of what has been put there, by as much as fits into memory. The variable is documented,
    but nothing takes it as an argument. Seen in 5.17 to 5.24.
    """
    with _environment:
        before = os.environ.get(_NOT_AHEAD)
        os.environ[_NOT_AHEAD] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_NOT_AHEAD]
            else:
                os.environ[_NOT_AHEAD] = before


@contextmanager
def kept_as(keep: Callable[[nn.Parameter], nn.Parameter] | None) -> Iterator[None]:
    """Lets `from_pretrained` put something else into the model than a parameter that it has read.

    Private: the attribute `_is_hf_initialized`, by which it tells that a parameter needs no initialization. There is a
    public way to tell it where parameters go (`device_map`), and none that says what becomes of them. Seen in 5.17 to
    5.24.

    Args:
        keep: makes of a parameter what the model has in its place; None for itself.
    """

    def hook(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.is_meta:
            return None
        kept = keep(parameter) if keep is not None else parameter
        kept._is_hf_initialized = True  # type: ignore[attr-defined]
        return kept

    if keep is None:
        yield
        return
    handle = register_module_parameter_registration_hook(cast(Any, hook))
    try:
        yield
    finally:
        handle.remove()


_NOT_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"
_environment = threading.RLock()


def parameter_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The name of the parameter that each tensor of a checkpoint goes into when `transformers` loads it.

    Tensors that several others are fused into one of (the experts of a mixture) share the fused parameter's name.

    Reaches into how `from_pretrained` maps old names and layouts, which has no underscore and no documentation either:
    a block is to read its own tensors only, and `from_pretrained` reads files whole. Seen in 5.23 and 5.24.

    Args:
        model: of the whole model's class; may be on the meta device.
        stored: the names in the checkpoint.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    parameters = model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)[0] for name in stored
    }


def unused_names(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """The tensors of a checkpoint that a model has no place for, but those that `transformers` ignores knowingly.

    Private: the attribute `_keys_to_ignore_on_load_unexpected` of a model, and the names that `from_pretrained` adds to
    it. It has `output_loading_info`, which tells the same of files that were read whole. Seen in 5.23 and 5.24.

    Args:
        model: of the whole model's class; may be on the meta device.
        stored: the names in the checkpoint.
    """
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
    known = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    names = parameter_names(model, stored)
    return [own for own, name in names.items() if name not in known and not ignored.search(name)]


def checkpoint_tensors(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model as `save_pretrained` would write them: named and laid out as in its family's checkpoints.

    Reaches into what `save_pretrained` does to them, as above: a stage writes a shard of the whole model, and
    `save_pretrained` would name it as a model of its own. Seen in 5.23 and 5.24.

    Args:
        model: of the class; its own tensors do not matter.
        state: the tensors, by the names that they have in the model.
    """
    return revert_weight_conversion(model, dict(state))

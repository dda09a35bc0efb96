"""A pretrained model that a script has loaded: its config and weights as if they came from files, and the way back."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from lopt_pp.errors import LoptError
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.util.compat_torch import hooks_of
from lopt_pp.util.compat_transformers import attention_of, checkpoint_tensors

_FORMATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""As safetensors files name them. Others are none that weights are trained in, and are named as PyTorch names them."""

_CPU = torch.device("cpu")


def name_of(model: PreTrainedModel) -> str:
    """What a loaded model is called: where it was loaded from, or its class where it was made in the script."""
    return model.name_or_path or type(model).__name__


def check_model(model: object) -> PreTrainedModel:
    """Sees that what a script gives as a loaded model is one whose weights are there.

    Raises:
        LoptError: what it is instead.
    """
    if not isinstance(model, PreTrainedModel):
        if hasattr(model, "peft_config"):
            raise LoptError("model has an adapter (peft), and adapters are not supported yet; give merge_and_unload()")
        raise LoptError(
            f"model is a {type(model).__name__}; give a causal language model that transformers has loaded, its "
            f"directory or its hub id"
        )
    if getattr(model, "peft_config", None):
        raise LoptError("model has an adapter, and adapters are not supported yet; give the model without it")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise LoptError(
                f"model: {name} is on the meta device, or on the disk: load it without device_map, or give its "
                f"directory in place of it"
            )
    return model


def check_trainable(model: PreTrainedModel) -> None:
    """Sees that no weights of a loaded model are frozen, since all of them would be trained.

    Raises:
        LoptError: some are.
    """
    # Those of quantized models are integers, which have a refusal of their own.
    floats = [(name, own) for name, own in model.named_parameters() if own.is_floating_point()]
    frozen = [name for name, own in floats if not own.requires_grad]
    if frozen:
        others = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        raise LoptError(
            f"model: {frozen[0]}{others} are frozen (requires_grad is False), and all weights of a stage are trained; "
            f"call model.requires_grad_(True) if that is meant"
        )


def check_modules(model: PreTrainedModel) -> None:
    """Sees that a loaded model has the modules that its config makes, since its blocks are built by that, and no hooks.

    Raises:
        LoptError: one of them was replaced, added or taken out, or has a hook that is not of `transformers` itself.
    """
    with torch.device("meta"):  # Without memory for its weights.
        fresh = type(model)(config_of(model))
    expected, own = ({name: type(module) for name, module in each.named_modules()} for each in (fresh, model))
    for name in [*expected, *(name for name in own if name not in expected)]:
        before, now = expected.get(name), own.get(name)
        if before is not now:
            was, has = ("nothing" if kind is None else f"a {kind.__name__}" for kind in (before, now))
            raise LoptError(
                f"model: {name} is {has}, and its config makes it {was}: blocks are built by the config, with the "
                f"weights of the model; change its config instead"
            )
    for name, module in model.named_modules():
        for kind, hook in hooks_of(module):
            if not str(getattr(hook, "__module__", "")).startswith("transformers."):  # Its own go with the blocks.
                raise LoptError(
                    f"model: {name or 'all of it'} has a {kind}, {_called(hook)}: blocks are built by the config, with "
                    f"the weights of the model, and would run without it; remove it (register_... has returned its "
                    f"handle), or write an objective, which sees what a block computes"
                )


def _called(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def config_of(model: PreTrainedModel, attn_implementation: str | None = None) -> PreTrainedConfig:
    """A copy of a loaded model's config.

    Args:
        model: loaded.
        attn_implementation: its attention kernel; None for that which the model was loaded with.
    """
    own = type(model.config).from_dict(
        copy.deepcopy(model.config.to_dict()), attn_implementation=attn_implementation or attention_of(model.config)
    )
    assert isinstance(own, PreTrainedConfig)
    own.name_or_path = name_of(model)
    return own


def generation_of(model: PreTrainedModel) -> GenerationConfig:
    """A copy of a loaded model's generation settings."""
    return copy.deepcopy(model.generation_config or GenerationConfig.from_model_config(model.config))


class LoadedWeights(PretrainedWeights):
    """The weights of a loaded model, by the names and in the layout that its files would have.

    Args:
        model: loaded.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.name_or_path = name_of(model)
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self._tensors = checkpoint_tensors(model, state)
        self.files = dict.fromkeys(self._tensors, "memory")

    def read(
        self, names: Sequence[str], device: torch.device = _CPU, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name].to(device, dtype or self._tensors[name].dtype, copy=True) for name in names}

    def formats(self, names: Iterable[str]) -> dict[str, str]:
        dtypes = {name: self._tensors[name].dtype for name in names}
        return {name: _FORMATS.get(dtype, _other(dtype)) for name, dtype in dtypes.items()}

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        yield


def _other(dtype: torch.dtype) -> str:
    """Such as F8_E4M3FN or I8."""
    return str(dtype).removeprefix("torch.").upper().replace("FLOAT", "F").replace("UINT", "U").replace("INT", "I")


def write_back(model: PreTrainedModel, trained: Mapping[str, torch.Tensor], ties_embeddings: bool) -> None:
    """Gives a loaded model the weights that were trained of it, each in the dtype that it has there.

    Where two blocks have trained its embeddings, which it had tied, the output head gets a tensor of its own.

    Args:
        model: loaded; changed in place.
        trained: the parameters, by their names in the model.
        ties_embeddings: whether the output head is the input embedding in them, too.
    """
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings and not ties_embeddings and isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = False
    own = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in trained.items():
            own[name].copy_(parameter)

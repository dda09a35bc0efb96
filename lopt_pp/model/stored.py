"""What the files of a model hold, besides or instead of the tensors of its class: quantized weights, leftovers."""

import copy
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.errors import LoptError
from lopt_pp.model.location import ADAPTER
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.util.compat_transformers import unused_names

logger = logging.getLogger(__name__)

_SHOWN = 3
"""Names in a message."""

_NAMES = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
}
"""What users call the methods of `quantization_config`; the others are called there as everywhere."""

_LOADED = 'AutoModelForCausalLM.from_pretrained("{name}", {how}, dtype="auto")'

_DEQUANTIZE = {
    "fp8": _LOADED.replace("{how}", "quantization_config=FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": _LOADED.replace("{how}", "quantization_config=Mxfp4Config(dequantize=True)"),
    "compressed-tensors": _LOADED.replace("{how}", "quantization_config=CompressedTensorsConfig(dequantize=True)"),
    "bitsandbytes": 'AutoModelForCausalLM.from_pretrained("{name}").dequantize()',
}
"""What gives the weights in bfloat16 or the like again."""

_PARTS = {
    "bitsandbytes": r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|SCB|weight_format)$",
    "compressed-tensors": r"\.weight_(packed|shape|zero_point|global_scale)$",
    "GPTQ or AWQ": r"\.(qweight|qzeros|g_idx)$",
    "MXFP4": r"_(blocks|scales)$",
    "FP8": r"\.(weight_scale(_inv|_2)?|(input|activation)_scale(_inv)?|scale_inv)$",
    "MLX": r"\.(scales|biases)$",
}
"""By method, the names of the tensors that stand beside quantized weights, from the most telling on."""


def without_quantization(
    config: PreTrainedConfig, name: str, weights: PretrainedWeights | None = None, warns: bool = True
) -> PreTrainedConfig:
    """A model's config, without what it says of a quantization that its weights have not, or no longer.

    Args:
        config: of the model.
        name: of the model, for messages.
        weights: of the model; None where they are not looked at, and the config is believed.
        warns: whether to say so where something is left out.

    Raises:
        LoptError: the weights are quantized; the text says how, and what to do.
    """
    said = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if said is None and isinstance(getattr(config, "quantization", None), dict):
        raise LoptError(_refusal(name, "MLX"))
    if said is None:
        return config
    said = said if isinstance(said, dict) else said.to_dict()
    named = said.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in said else "unknown")
    method = str(getattr(named, "value", named))  # An enumeration, of a loaded model.
    if weights is None or _method_of(weights.files) or not _are_plain(weights):
        raise LoptError(_refusal(name, method))
    if warns:
        logger.warning(
            "%s: its config.json says that its weights are quantized (%s), and they are not: its quantization_config "
            "is left out, in the result too",
            name,
            _NAMES.get(method, method),
        )
    own = copy.deepcopy(config)
    for attribute in ("quantization_config", "compression_config"):
        if hasattr(own, attribute):
            delattr(own, attribute)
    return own


def check_stored(model: PreTrainedModel, weights: PretrainedWeights) -> list[str]:
    """The tensors of a model's files that its class has no place for.

    Those that `transformers` leaves out without a word are not among them, nor buffers that are made anew and the
    second of two tied tensors.

    Args:
        model: the whole model; may be on the meta device.
        weights: its files.

    Raises:
        LoptError: they stand beside quantized weights, whose config is lost.
    """
    unused = unused_names(model, weights.files)
    if method := _method_of(unused):
        raise LoptError(
            f"--model_name_or_path {weights.name_or_path} has quantized weights ({method}: {listed(unused)}), and its "
            f"config.json has no quantization_config; give the model that it was made from, or the config that belongs "
            f"to these weights"
        )
    return unused


def check_are_floats(
    formats: Mapping[str, str], parameters: Collection[str], names: Mapping[str, str], source: str
) -> None:
    """Refuses weights of whole numbers, as quantized ones are, beside which nothing says that they are quantized.

    Args:
        formats: the dtypes of the tensors as the headers of their files have them, by their names there.
        parameters: the names of the model's own.
        names: by the names in the files, those in the model.
        source: directory or hub id of the model.

    Raises:
        LoptError: a parameter is among them.
    """
    whole = [
        name
        for name, format in formats.items()
        if names[name] in parameters and not format.removeprefix("B").startswith("F")
    ]
    if whole:
        raise LoptError(
            f"{source}: weights are whole numbers, as quantized ones are ({listed(sorted(whole))}), and there are no "
            f"scales for them; give the model that it was made from"
        )


def listed(names: Iterable[str]) -> str:
    """A few of them, and how many there are besides."""
    first, rest = list(names)[:_SHOWN], list(names)[_SHOWN:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")


def warn_of_unused(unused: Sequence[str], name: str) -> None:
    """Says which tensors of a model's files are not used, and what to do about it where that can be told.

    Args:
        unused: names of tensors.
        name: directory or hub id of the model.
    """
    if (Path(name) / ADAPTER).exists():
        logger.warning("%s: the adapter beside the model (%s) is not used: merge it first, or remove it", name, ADAPTER)
    if not unused:
        return
    how = ""
    if any("lora_" in tensor for tensor in unused):
        how = "; they are of an adapter that was not merged: merge it first if the model is to have it"
    logger.warning("%s: %d tensors of its files are not used: %s%s", name, len(unused), listed(unused), how)


def _method_of(names: Iterable[str]) -> str | None:
    """How weights are quantized beside which there are tensors of these names; None where nothing says so."""
    names = list(names)
    for method, pattern in _PARTS.items():
        if any(re.search(pattern, name) for name in names):
            return method
    return None


def _are_plain(weights: PretrainedWeights) -> bool:
    """Whether the weights are floating-point numbers of 16 bits or more, by the file that holds most of them."""
    ((largest, _),) = Counter(weights.files.values()).most_common(1)
    own = [name for name, file in weights.files.items() if file == largest]
    return all(dtype is not None for dtype in weights.dtypes(own).values())


def _refusal(name: str, method: str) -> str:
    dequantize = _DEQUANTIZE.get(method, "").replace("{name}", name)
    how = f", or dequantize it: {dequantize} and save_pretrained(DIRECTORY)" if dequantize else ""
    shown = _NAMES.get(method, method)
    return (
        f"--model_name_or_path {name} has quantized weights ({shown}), which cannot be trained yet; give the model "
        f"that it was made from{how}"
    )

"""What a model's files hold besides the tensors of its class is named; quantized weights are refused, not used."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError
from lopt_pp.evaluation.losses import load_whole
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import load_model_config, model_class_of
from lopt_pp.model.stored import listed, warn_of_unused, without_quantization
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights

PROJECTION = "model.layers.1.self_attn.q_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def write(path: Path, family: str = "llama", extra: Sequence[str] = (), **changes: Any) -> Path:
    """Writes a model whose file has more tensors than its class."""
    AutoModelForCausalLM.from_config(tiny_config(family, **changes)).save_pretrained(path)
    tensors = load_file(path / "model.safetensors") | {name: torch.ones(2) for name in extra}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def say(path: Path, **entries: object) -> None:
    """Adds entries to the model's config.json."""
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | entries))


def store_as(path: Path, dtype: torch.dtype) -> None:
    """Stores the weights of a projection in another dtype."""
    tensors = load_file(path / "model.safetensors")
    tensors[f"{PROJECTION}.weight"] = tensors[f"{PROJECTION}.weight"].to(dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def unused(path: Path) -> list[str]:
    config = AutoConfig.from_pretrained(path)
    model_class = model_class_of(config)
    structure = check_split(model_class, config, split_evenly(config.num_hidden_layers, 2))
    return BlockBuilder(model_class, config, structure).unused_tensors(PretrainedWeights(str(path)))


def test_all_of_a_plain_model_is_used(tmp_path: Path) -> None:
    for family in ("llama", "gpt2", "qwen3_moe"):
        assert unused(write(tmp_path / family, family, tie_word_embeddings=True)) == []


def test_leftovers_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = [f"{PROJECTION}.lora_A.default.weight", f"{PROJECTION}.lora_B.default.weight"]
    extra = [*adapter, "model.layers.4.mlp.up_proj.weight", "mtp.head.weight"]
    found = unused(write(tmp_path, extra=extra))
    assert sorted(found) == sorted(extra)
    with caplog.at_level(logging.WARNING):
        warn_of_unused(sorted(found), "a-model")
    (message,) = caplog.messages
    assert message.startswith(
        f"a-model: 4 tensors of its files are not used: {', '.join(sorted(found)[:3])} and 1 more"
    )
    assert message.endswith("merge it first if the model is to have it")


def test_what_transformers_leaves_out_knowingly_needs_no_word(tmp_path: Path) -> None:
    """Buffers of old, the second of tied tensors, and what a class says itself (GPT-2's masks)."""
    extra = ("model.layers.0.self_attn.rotary_emb.inv_freq",)
    assert unused(write(tmp_path / "llama", extra=extra, tie_word_embeddings=True)) == []
    path = write(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert unused(path) == []
    assert unused(write(tmp_path / "gpt2", "gpt2", extra=("transformer.h.0.attn.bias",))) == []


@pytest.mark.parametrize(
    ("suffix", "method"),
    [
        ("weight_scale_inv", "FP8"),
        ("weight_scale", "FP8"),
        ("weight.absmax", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("scales", "MLX"),
    ],
)
def test_quantized_weights_whose_config_is_lost_are_refused(tmp_path: Path, suffix: str, method: str) -> None:
    path = write(tmp_path, extra=(f"{PROJECTION}.{suffix}",))
    store_as(path, torch.float8_e4m3fn)
    with pytest.raises(LoptError, match=rf"quantized weights \({method}: {PROJECTION}.{suffix}\), .*no quantization_c"):
        unused(path)
    with pytest.raises(LoptError, match=method):  # As `lopt-pp evaluate` loads it.
        load_whole(ModelConfig(str(path)))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (FP8, r"\(FP8\).*FineGrainedFP8Config\(dequantize=True\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"\(bitsandbytes\).*\.dequantize\(\)"),
        ({"load_in_4bit": True}, r"\(bitsandbytes\)"),
        ({"quant_method": "gptq", "bits": 4}, r"\(GPTQ\), .* that it was made from$"),
        ({"quant_method": "awq", "bits": 4}, r"\(AWQ\)"),
        ({"quant_method": "compressed-tensors"}, r"\(compressed-tensors\)"),
        ({"quant_method": "mxfp4"}, r"\(MXFP4\).*Mxfp4Config"),
        ({"quant_method": "new"}, r"\(new\)"),
    ],
)
def test_quantized_weights_are_refused_with_what_to_do(tmp_path: Path, config: dict[str, object], what: str) -> None:
    path = write(tmp_path)
    say(path, quantization_config=config)
    store_as(path, torch.float8_e4m3fn)
    said, weights = load_model_config(ModelConfig(str(path))), PretrainedWeights(str(path))
    for given in (weights, None):  # `lopt-pp plan` does not look at them.
        with pytest.raises(LoptError, match=f"^--model_name_or_path {path} has quantized weights {what}") as refused:
            without_quantization(said, str(path), given)
        assert "\n" not in str(refused.value)


def test_whole_numbers_without_scales_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    store_as(path, torch.int8)
    config = AutoConfig.from_pretrained(path)
    first, last = split_evenly(config.num_hidden_layers, 2)
    structure = check_split(model_class_of(config), config, (first, last))
    builder, weights = BlockBuilder(model_class_of(config), config, structure), PretrainedWeights(str(path))
    builder.from_pretrained(last, weights)
    with pytest.raises(
        LoptError, match=rf"whole numbers, as quantized ones are \({PROJECTION}.weight\), and there are"
    ):
        builder.from_pretrained(first, weights)


def test_mlx_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    say(path, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(LoptError, match=r"\(MLX\)"):
        without_quantization(load_model_config(ModelConfig(str(path))), str(path))


def test_a_quantization_that_is_over_is_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path)
    say(path, quantization_config=FP8)
    said, weights = load_model_config(ModelConfig(str(path))), PretrainedWeights(str(path))
    with caplog.at_level(logging.WARNING):
        plain = without_quantization(said, str(path), weights)
    assert not hasattr(plain, "quantization_config") and "quantization_config" not in plain.to_json_string()
    assert hasattr(said, "quantization_config"), "it is the caller's"
    (message,) = caplog.messages
    assert "quantized (FP8), and they are not: its quantization_config is left out" in message
    assert without_quantization(plain, str(path), weights) is plain


def test_names_are_listed_in_a_line() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_an_adapter_beside_a_whole_model_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path)
    (path / "adapter_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        warn_of_unused(unused(path), str(path))
    assert caplog.messages == [
        f"{path}: the adapter beside the model (adapter_config.json) is not used: merge it first, or remove it"
    ]

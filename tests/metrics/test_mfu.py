"""Counting a stage's arithmetic, and devices' peaks."""

import pytest
import torch
from families import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from lopt_pp.config.optim import OptimConfig
from lopt_pp.metrics.mfu import Work, peak_of, work_of
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.planning.synthetic import random_microbatch
from lopt_pp.stage.stage import Stage


@pytest.mark.parametrize("index", [0, 1])
def test_the_count_is_pytorchs_without_attention(index: int) -> None:
    """Of forward and backward of one microbatch, all of whose tokens have a loss but each row's last."""
    config = tiny_config("llama", attn_implementation="sdpa")
    config.tie_word_embeddings = False
    specs = split_evenly(config.num_hidden_layers, 2)
    model_class = model_class_of(config)
    block = BlockBuilder(model_class, config, check_split(model_class, config, specs)).with_random_weights(specs[index])
    stage = Stage(block, local_objective(block, ObjectiveConfig(), 0), OptimConfig(), 1)
    rows, tokens = 2, 24
    batch = random_microbatch((rows, tokens), config.vocab_size, torch.device("cpu"))
    received = None if index == 0 else torch.randn(rows, tokens, config.hidden_size)
    counter = FlopCounterMode(display=False)
    with counter:
        stage.loss(stage.forward(batch, received), batch, 1).backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(
        value
        for operation, value in counted.items()
        if "attention" not in str(operation) and "bmm" not in str(operation)
    )
    work = work_of(block, stage.objective, 1.0, None)
    # PyTorch's counter does not see into the chunked loss.
    targets = rows * (tokens - 1)
    assert work.flops(rows * tokens, targets) == products + 6 * work.per_target * targets
    whole = AutoModelForCausalLM.from_config(config)
    assert work.per_target == (whole.lm_head.weight.numel() if index == 1 else 0)


def test_experts_count_as_often_as_they_are_chosen() -> None:
    config = tiny_config("qwen3_moe")
    specs = split_evenly(config.num_hidden_layers, 2)
    model_class = model_class_of(config)
    block = BlockBuilder(model_class, config, check_split(model_class, config, specs)).with_random_weights(specs[1])
    stacked = [p for layer in block.layers for p in layer.parameters() if p.ndim == 3]
    flat = [p for layer in block.layers for p in layer.parameters() if p.ndim == 2]
    assert stacked, "this family's experts are no longer stacked"
    share = config.num_experts_per_tok / config.num_experts
    expected = sum(p.numel() for p in flat) + share * sum(p.numel() for p in stacked)
    assert work_of(block, None, 1.0, None).per_token == pytest.approx(expected)


def test_utilization() -> None:
    record = {"num_tokens": 100, "num_targets": 10, "step_seconds": 2.0}
    assert Work(50, 30, 0, 1.0, 1e5).utilization(record) == {"mfu": 6 * (5000 + 300) / 2.0 / 1e5}
    assert Work(50, 30, 0, 0.0, 1e5).utilization(record) == {"mfu": 2 * (5000 + 300) / 2.0 / 1e5}
    half = {"mfu": (4 * (5000 + 300) + 6 * 700 / 2) / 2.0 / 1e5}
    assert Work(50, 30, 7, 0.5, 1e5).utilization(record) == half
    assert Work(50, 30, 0, 1.0, None).utilization(record) == {}


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989.4e12, 67e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None),
        ("Tesla T4", None, None),
    ],
)
def test_peaks(name: str, bfloat16: float | None, float32: float | None) -> None:
    assert peak_of(name, torch.bfloat16) == bfloat16
    assert peak_of(name, torch.float32) == float32

"""Packed, padding-free and padded rows give the same losses, and a class that cannot keep rows apart is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from families import FAMILIES, tiny_config
from tiny import write_model
from transformers import AutoConfig, BloomConfig, LlamaForCausalLM, Qwen3NextConfig
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from lopt_pp.config.optim import OptimConfig
from lopt_pp.data import MicrobatchSampler, TokenizedRows
from lopt_pp.data.dataset import Rows
from lopt_pp.data.packed_rows import PackedRows
from lopt_pp.errors import LoptError
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.verify_packing import check_packing
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.stage.end_to_end import pad_alike
from lopt_pp.stage.stage import Stage

LENGTHS = [9, 3, 14, 2, 7, 5, 11, 4, 2, 6]


def make_rows() -> TokenizedRows:
    """Rows of different lengths; the loss counts on their second half and their first token, which nothing predicts."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 128, (length,), generator=draw).tolist() for length in LENGTHS]
    labels = [[row[0]] + [-100] * (len(row) // 2 - 1) + row[max(len(row) // 2, 1) :] for row in ids]
    targets = [sum(label != -100 for label in row[1:]) for row in labels]
    columns = {"input_ids": ids, "labels": labels, "length": LENGTHS, "num_targets": targets}
    return TokenizedRows(Dataset.from_dict(columns), "a test", {})


def losses(model: Path, rows: Rows, alike: bool = False, **options: Any) -> dict[str, float]:
    """The mean losses of both stages over a step of all rows, and their gradients' norms.

    Args:
        model: to train.
        rows: to train on.
        alike: whether all microbatches are padded to one shape, as for an end-to-end pipeline.
        options: of the data order.
    """
    sampler = MicrobatchSampler(
        rows,
        per_device_train_batch_size=len(LENGTHS) if options.get("padding_free") else 3,
        gradient_accumulation_steps=1 if options.get("padding_free") else 4,
        shuffle=False,
        seed=0,
        pad_token_id=0,
        **options,
    )
    config = AutoConfig.from_pretrained(model)
    specs = split_evenly(config.num_hidden_layers, 2)
    model_class = model_class_of(config)
    builder = BlockBuilder(model_class, config, check_split(model_class, config, specs))
    stages = []
    for spec in specs:
        block = builder.from_pretrained(spec, PretrainedWeights(str(model)))
        stages.append(Stage(block, local_objective(block, ObjectiveConfig(), 0), OptimConfig(max_grad_norm=0.0), 10))
    batches = sampler.microbatches(0)
    for batch in pad_alike(batches) if alike else batches:
        hidden_states = None
        for stage in stages:
            output = stage.forward(batch, hidden_states)
            stage.loss(output, batch, stage.count(sampler.counts(0))).backward()
            hidden_states = stage.outgoing(output)
    records = [stage.step(0) for stage in stages]
    return {f"{stage} {name}": value for stage, record in enumerate(records) for name, value in record.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padding_free_rows_give_the_losses_of_padded_ones(family: str, tmp_path: Path) -> None:
    changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model = write_model(tmp_path / "model", family, **changes)
    rows = make_rows()
    padded = losses(model, rows)
    assert padded["0 grad_norm"] > 0 and padded["1 loss"] > 1
    assert losses(model, PackedRows(rows, 16), keep_apart=True) == pytest.approx(padded, rel=2e-4)
    assert losses(model, rows, padding_free=True) == pytest.approx(padded, rel=2e-4)
    config = AutoConfig.from_pretrained(model)
    specs = split_evenly(config.num_hidden_layers, 3)
    model_class = model_class_of(config)
    check_packing(model_class, config, specs, check_split(model_class, config, specs))


def test_packed_microbatches_may_be_padded_alike(tmp_path: Path) -> None:
    model, rows = write_model(tmp_path / "model"), PackedRows(make_rows(), 16)
    expected = losses(model, rows, keep_apart=True)
    assert losses(model, rows, alike=True, keep_apart=True) == pytest.approx(expected, rel=2e-4)


def test_flash_attention_finds_the_rows_by_the_positions() -> None:
    sampler = MicrobatchSampler(
        PackedRows(make_rows(), 16),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        shuffle=False,
        seed=0,
        pad_token_id=0,
        padding_free=True,
    )
    found = []
    for batch in (batch for step in range(sampler.steps_per_epoch) for batch in sampler.microbatches(step)):
        (starts, _), _ = prepare_fa_kwargs_from_position_ids(batch.position_ids)
        assert batch.token_mask.all() and starts[-1] == batch.num_tokens
        found += starts.diff().tolist()
    assert sorted(found) == sorted(LENGTHS)


def test_it_matters_that_rows_are_kept_apart(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    rows = make_rows()
    mixed = losses(model, PackedRows(rows, 16), keep_apart=False)
    assert mixed["1 loss"] != pytest.approx(losses(model, rows)["1 loss"], rel=2e-4)


def refusal(model_class: type, config: object) -> str:
    specs = split_evenly(config.num_hidden_layers, 2)  # type: ignore[attr-defined]
    with pytest.raises(LoptError) as raised:
        check_packing(model_class, config, specs, check_split(model_class, config, specs))  # type: ignore[arg-type]
    return str(raised.value)


def test_layers_that_carry_a_state_are_refused() -> None:
    """The linear attention of Qwen3-Next runs on over the end of a row."""
    config = Qwen3NextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    text = refusal(model_class_of(config), config)
    assert "Qwen3NextForCausalLM cannot be trained with --packing or --padding_free: rows that share a row give" in text


def test_a_class_that_takes_no_positions_is_refused() -> None:
    config = BloomConfig(vocab_size=128, hidden_size=64, n_layer=4, n_head=4)
    text = refusal(model_class_of(config), config)
    assert text.startswith("BloomForCausalLM cannot be trained with --packing or --padding_free: rows that share a row")


def test_the_check_leaves_the_config_alone() -> None:
    config = tiny_config("llama")
    before = copy.deepcopy(config.to_dict())
    specs = split_evenly(4, 2)
    check_packing(LlamaForCausalLM, config, specs, check_split(LlamaForCausalLM, config, specs))
    assert config.to_dict() == before

"""End-to-end training as a pipeline, and in one process, is the plain training loop of the whole model."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from end_to_end_worker import OWN_SHAPES, data_order
from ranks import to_the_end
from tiny import write_inputs
from torch import nn
from transformers import AutoModelForCausalLM

from lopt_pp.data import Microbatch
from lopt_pp.stage.end_to_end import pad_alike

STEPS = 8

# Name: schedule (None is one process), microbatches per step, dtype.
CASES: dict[str, tuple[str | None, int, str]] = {
    "one process": (None, 1, "float32"),
    "one process, accumulation 4": (None, 4, "float32"),
    "1F1B": ("1F1B", 1, "float32"),
    "1F1B, accumulation 4": ("1F1B", 4, "float32"),
    "1F1B, own shapes": (OWN_SHAPES, 1, "float32"),
    "1F1B, own shapes, accumulation 4": (OWN_SHAPES, 4, "float32"),
    "GPipe, accumulation 4": ("GPipe", 4, "float32"),
    "interleaved zero-bubble": ("InterleavedZeroBubble", 1, "float32"),
    "interleaved zero-bubble, accumulation 4": ("InterleavedZeroBubble", 4, "float32"),
    "zero-bubble V, accumulation 4": ("ZBVZeroBubble", 4, "float32"),
    "one process, bfloat16": (None, 4, "bfloat16"),
    "1F1B, bfloat16": ("1F1B", 4, "bfloat16"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All cases, trained."""
    folder = tmp_path_factory.mktemp("end_to_end")
    # 41 rows: the last step of an epoch has fewer microbatches, and the last of these fewer rows.
    write_inputs(folder, rows=41, tie_word_embeddings=True)
    common = {
        "model": str(folder / "model"),
        "rows": str(folder / "rows.jsonl"),
        "steps": STEPS,
        "batch_size": 2,
        "rate": 1e-3,
    }
    cases = {
        name: common
        | {"schedule": schedule, "accumulation": accumulation, "dtype": dtype, "max_grad_norm": 0.5}
        | {"output": str(folder / name)}
        for name, (schedule, accumulation, dtype) in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(list(cases.values())))
    to_the_end(folder / "log", 3, [str(folder / "cases.json")], module="end_to_end_worker")
    return cases


def results_of(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float], list[list[float]]]:
    """The weights of all blocks of a case, its losses, and the gradient norms as each process has seen them."""
    parts = [torch.load(file) for file in sorted(Path(case["output"]).glob("*.pt"))]
    weights = {name: tensor for part in parts for name, tensor in part["weights"].items()}
    with_loss = [part for part in parts if part["losses"][0] is not None]
    assert len(with_loss) == 1, "one process has the last block"
    return weights, [loss.item() for loss in with_loss[0]["losses"]], [part["norms"] for part in parts]


def plain(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """The same training of the whole model in a plain loop, row by row without padding."""
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).train()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    adam = torch.optim.AdamW(model.parameters(), lr=case["rate"], eps=1e-6)
    sampler = data_order(case)
    losses, norms = [], []
    for step in range(case["steps"]):
        total, count = 0.0, 0
        for batch in sampler.microbatches(step):
            for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.token_mask, strict=True):
                logits = model(input_ids=ids[mask][None], use_cache=False).logits[0]
                loss = nn.functional.cross_entropy(logits[:-1], labels[mask][1:], reduction="sum")
                loss.backward()
                total += loss.item()
                count += int((labels[1:] != -100).sum())
        for parameter in model.parameters():
            parameter.grad /= count
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), case["max_grad_norm"]).item())
        losses.append(total / count)
        adam.step()
        adam.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, losses, norms


@pytest.mark.parametrize("name", [name for name, (*_, dtype) in CASES.items() if dtype == "float32"])
def test_the_plain_loop_gives_the_same_weights(cases: dict[str, dict[str, Any]], name: str) -> None:
    case = cases[name]
    expected, expected_losses, expected_norms = plain(case)
    weights, losses, norms = results_of(case)
    start = dict(AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).named_parameters())
    assert max(expected_norms) > case["max_grad_norm"], "nothing was clipped: the comparison would not show it"
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert all(own == pytest.approx(expected_norms, rel=1e-4) for own in norms), "the norm is over all blocks"
    assert weights.keys() == expected.keys()
    for parameter, tensor in expected.items():
        moved = (tensor - start.get(parameter, start["model.embed_tokens.weight"])).abs().max()
        assert moved > 1e-3, f"{parameter} has hardly moved: the comparison would prove nothing"
        torch.testing.assert_close(
            weights[parameter], tensor, rtol=0, atol=2e-5, msg=partial("{}: {}".format, parameter)
        )


def test_a_pipeline_that_pads_nothing_alike_has_the_gradient_of_pytorchs(cases: dict[str, dict[str, Any]]) -> None:
    """The benchmarks' fairer baseline: the microbatches of a step have shapes of their own."""
    case = cases["1F1B, own shapes, accumulation 4"]
    steps = [data_order(case).microbatches(step) for step in range(STEPS)]
    unequal = [len({batch.input_ids.shape for batch in batches}) > 1 for batches in steps]
    assert sum(unequal) >= STEPS - 1, "but for the rest of an epoch, a step has something to pad"
    weights, losses, norms = results_of(case)
    expected, expected_losses, expected_norms = results_of(cases["1F1B, accumulation 4"])
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert norms[0] == pytest.approx(expected_norms[0], rel=1e-5)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5, msg=partial("{}: {}".format, name))


def test_bfloat16_trains_float32_weights(cases: dict[str, dict[str, Any]]) -> None:
    """What crosses the boundary is rounded, forward and back; the rest is one process's computation."""
    pipelined, losses, _ = results_of(cases["1F1B, bfloat16"])
    alone, alone_losses, _ = results_of(cases["one process, bfloat16"])
    assert all(tensor.dtype == torch.float32 for tensor in pipelined.values())
    assert losses == pytest.approx(alone_losses, rel=1e-2)
    # Adam's first steps have full size for any gradient, so single weights differ; the mean tells.
    assert all((pipelined[name] - alone[name]).abs().mean() < 2e-3 for name in alone)


def test_padding_leaves_what_counts() -> None:
    ids = torch.tensor([[5, 6, 7]])
    short = Microbatch(0, 0, ids, torch.tensor([[-100, 6, 7]]), ids > 0, torch.tensor([0, 1]), 3, 2)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 8], [-100, 6, -100, -100]])
    long = Microbatch(0, 1, ids, labels, ids > 0, torch.tensor([0, 2]), 6, 2)
    padded, same = pad_alike([short, long])
    assert padded.input_ids.tolist() == [[5, 6, 7, 0], [0, 0, 0, 0]]
    assert padded.labels.tolist() == [[-100, 6, 7, -100], [-100] * 4]
    assert padded.token_mask.tolist() == [[True, True, True, False], [False] * 4]
    assert padded.target_positions.tolist() == [0, 1] and padded.num_targets == 2
    assert torch.equal(same.input_ids, long.input_ids) and torch.equal(same.labels, long.labels)

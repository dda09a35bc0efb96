"""What reaches into private parts of PyTorch still works.

A test that fails after an upgrade says that the library has changed there: the docstring of the item says what it is
for and what it reaches into.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operators_seen import TINY, Seen
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lopt_pp.util import compat_torch


def test_fake_tensors_have_no_memory_and_go_through_a_model() -> None:
    with compat_torch.fake_tensors():
        huge = torch.empty(1 << 25, 1 << 25)
        assert compat_torch.is_fake(huge) and (huge @ huge).shape == huge.shape
        with compat_torch.real_tensors():
            assert not compat_torch.is_fake(torch.ones(2)) and torch.ones(2).sum() == 2
        assert compat_torch.is_fake(torch.ones(2))
    assert not compat_torch.is_fake(torch.ones(2))


def test_operators_are_seen_with_their_arguments() -> None:
    bias, left, right = torch.ones(3), torch.ones(2, 4), torch.ones(4, 3)
    with Seen() as seen:
        torch.addmm(bias, left, right, alpha=2)
    ((function, args, kwargs),) = seen.calls
    assert function.overloadpacket is torch.ops.aten.addmm
    named = compat_torch.arguments_by_name(function, args, kwargs)
    assert named["self"] is bias and named["mat1"] is left and named["mat2"] is right and named["alpha"] == 2
    assert "beta" not in named


def test_an_operator_that_is_written_in_python_gives_its_code() -> None:
    @torch.library.custom_op("lopt_pp_test::twice", mutates_args=())
    def twice(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + tensor

    given = torch.ones(2)
    with Seen() as seen:
        twice(given)
    code = compat_torch.python_code(seen.calls[0][0])
    assert code is not None and code(given).tolist() == [2, 2]
    assert compat_torch.python_code(torch.ops.aten.addmm.default) is None
    assert compat_torch.python_code(object()) is None


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch before 2.13")
def test_the_chunked_loss_can_be_looked_into() -> None:
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    weight, targets = torch.ones(8, 4, requires_grad=True), torch.zeros(6, dtype=torch.int64)
    with Seen() as seen:
        F.linear_cross_entropy(torch.ones(6, 4), weight, targets, reduction="sum", options=options)
    inside = [code for function, *_ in seen.calls if (code := compat_torch.python_code(function)) is not None]
    assert len(inside) == 1, "the chunked loss is no longer one operator that is written in Python"


def test_attention_runs_a_kernel_that_is_known() -> None:
    query = torch.ones(1, 2, 8, 16, requires_grad=True)
    with Seen() as seen:
        F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    known = [compat_torch.FUSED_ATTENTION[packet] for packet in seen.packets & compat_torch.FUSED_ATTENTION.keys()]
    assert sorted(known) == [False, True], "one forward and one backward"
    for function, args, kwargs in seen.calls:
        if function.overloadpacket in compat_torch.FUSED_ATTENTION:
            assert {"query", "key", "value"} <= compat_torch.arguments_by_name(function, args, kwargs).keys()


def test_kernels_of_a_gpu_run_on_fake_tensors() -> None:
    with compat_torch.fake_tensors():
        query = torch.empty(2, 4, 16, 64, dtype=torch.bfloat16)
        mask = torch.zeros(2, 4, 16, 16, dtype=torch.bfloat16)
        for result in (
            compat_torch.flash_attention(query, query, query, 0.0, True, 0.125),
            compat_torch.efficient_attention(query, query, query, mask, True, 0.0, False, None),
            compat_torch.plain_attention(query, query[:, :2], query[:, :2], None, 0.0, True, None, True),
        ):
            assert result.shape == query.shape and result.dtype == query.dtype


def test_plain_attention_is_attention() -> None:
    query, key, value = torch.randn(3, 1, 2, 8, 16).unbind()
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    plain = compat_torch.plain_attention(query, key, value, None, 0.0, True, None, False)
    assert torch.allclose(plain, expected, atol=1e-5)


def test_products_of_experts_are_seen_by_the_name_that_is_known() -> None:
    with compat_torch.fake_tensors(), Seen() as seen:
        left, right = torch.empty(4, 16, dtype=torch.bfloat16), torch.empty(2, 16, 16, dtype=torch.bfloat16)
        F.grouped_mm(left, right, offs=torch.empty(2, dtype=torch.int32))
    assert compat_torch.GROUPED_PRODUCT in seen.packets


def test_a_model_calls_the_function_that_is_put_in_the_place_of_another_also_when_layers_run_again() -> None:
    """Within the backward of gradient checkpointing, where a `TorchFunctionMode` is off."""
    model, real, calls = LlamaForCausalLM(LlamaConfig(**TINY)).train(), F.scaled_dot_product_attention, []

    def noting(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return real(*args, **kwargs)

    model.gradient_checkpointing_enable({"use_reentrant": False})
    with compat_torch.replaced_function("scaled_dot_product_attention", noting):
        loss = model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum()
        assert len(calls) == TINY["num_hidden_layers"]
        loss.backward()
    assert len(calls) == 2 * TINY["num_hidden_layers"] and F.scaled_dot_product_attention is real


def test_modules_stay_as_they_are_for_as_long_as_they_are_told_to() -> None:
    with compat_torch.fake_tensors(), compat_torch.modules_stay():
        layer = nn.Linear(2, 2)
        weight = layer.weight
        assert layer.to("cpu", torch.bfloat16) is layer and layer.weight is weight
    assert nn.Linear(2, 2).to(torch.bfloat16).weight.dtype == torch.bfloat16


def test_a_layer_runs_another_forward_for_a_while() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    ids = torch.arange(8)[None]
    before, calls = model(input_ids=ids).logits, []

    def counting(run: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return run(*args, **kwargs)

        return forward

    layer = model.model.layers[0]
    with compat_torch.replaced_forward(layer, counting), compat_torch.replaced_forward(layer, counting):
        assert torch.equal(model(input_ids=ids).logits, before) and len(calls) == 2
    assert torch.equal(model(input_ids=ids).logits, before) and len(calls) == 2 and "forward" not in vars(layer)


def test_hooks_of_a_module_and_of_its_parameters() -> None:
    layer = nn.Linear(2, 2)
    assert not list(compat_torch.hooks_of(layer))
    layer.register_forward_hook(print)
    layer.register_forward_pre_hook(print)
    layer.register_full_backward_hook(print)
    layer.register_full_backward_pre_hook(print)
    layer.weight.register_hook(print)
    layer.bias.register_post_accumulate_grad_hook(print)
    kinds = ["forward hook", "forward pre-hook", "backward hook", "backward pre-hook", *["hook on a gradient"] * 2]
    assert list(compat_torch.hooks_of(layer)) == [(kind, print) for kind in kinds]
    assert not list(compat_torch.hooks_of(nn.Sequential(layer)))

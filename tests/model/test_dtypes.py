"""What dtype each weight is saved in."""

import logging

import pytest
import torch

from lopt_pp.model.dtypes import as_data, as_saved, dtype_of, most_common, own_dtypes

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_what_is_stored_in_8_bits_or_64_is_not_written_so() -> None:
    stored = {"a": torch.float8_e4m3fn, "b": torch.float64, "c": F16, "d": None, "e": torch.uint8}
    assert own_dtypes(stored, {name: name for name in stored}) == {"a": B16, "b": F32, "c": F16, "d": B16, "e": B16}


def test_a_parameter_that_several_tensors_are_fused_into_has_the_widest_dtype() -> None:
    assert own_dtypes({"x.0": B16, "x.1": F32, "y": B16}, {"x.0": "x", "x.1": "x", "y": "y"}) == {"x": F32, "y": B16}


def test_each_tensor_has_its_own_dtype_or_the_given_one() -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(3), "new": torch.randn(3), "count": torch.tensor([1])}
    own = {"a": B16, "b": F32, "count": B16}
    assert [t.dtype for t in as_saved(tensors, None, own).values()] == [B16, F32, F32, torch.int64]
    assert [t.dtype for t in as_saved(tensors, F16, own).values()] == [F16, F16, F16, torch.int64]
    assert as_saved({"b": torch.ones(1, dtype=B16)}, None, own)["b"].dtype == B16, "no wider than it was trained"


def test_a_number_that_float16_has_not_keeps_its_tensor_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"large": torch.tensor([1.0, 7e4]), "small": torch.tensor([6e4]), "broken": torch.tensor([float("inf")])}
    with caplog.at_level(logging.WARNING):
        saved = as_saved(tensors, F16, {})
    assert [tensor.dtype for tensor in saved.values()] == [F32, F16, F16]
    assert caplog.messages == ["large has numbers that float16 cannot hold: it is saved in float32"]


def test_as_plain_data() -> None:
    assert as_data({"a": B16, "b": B16, "c": F32}) == {"dtype": "bfloat16", "other_dtypes": {"c": "float32"}}
    assert as_data({"a": F16}) == {"dtype": "float16"} and as_data({}) == {}
    assert dtype_of("bfloat16") == B16 and most_common([]) is None
    with pytest.raises(ValueError, match="'int8'"):
        dtype_of("int8")

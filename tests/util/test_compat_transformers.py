"""What reaches into private parts of `transformers` still works.

A test that fails after an upgrade says that the library has changed there: the docstring of the item says what it is
for and what it reaches into.
"""

import threading
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import pytest
import torch
from chat import make_tokenizer
from operators_seen import TINY, Seen
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, masking_utils
from transformers.conversion_mapping import get_model_conversion_mapping

from lopt_pp.util import compat_torch, compat_transformers


def test_rows_that_share_one_are_not_told_apart_for_a_while() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    one, other = torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[7, 2, 3, 4, 5, 6]])

    def second_row_sees_the_first() -> bool:
        first, changed = (
            model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 3:] for ids in (one, other)
        )
        return not torch.equal(first, changed)

    assert not second_row_sees_the_first()
    with compat_transformers.no_packed_rows():
        assert second_row_sees_the_first()
    assert not second_row_sees_the_first()


def test_the_attention_of_a_config() -> None:
    config = LlamaConfig(**TINY | {"attn_implementation": "eager"})
    assert compat_transformers.attention_of(config) == "eager"
    assert compat_transformers.attention_of(LlamaConfig(**TINY)) is None
    with Seen() as seen:
        LlamaForCausalLM(config)(input_ids=torch.arange(8)[None])
    assert not seen.packets & compat_torch.FUSED_ATTENTION.keys()
    compat_transformers.set_attention(config, "sdpa")
    with Seen() as seen:
        LlamaForCausalLM(config)(input_ids=torch.arange(8)[None])
    assert compat_transformers.attention_of(config) == "sdpa" and seen.packets & compat_torch.FUSED_ATTENTION.keys()


def test_templates_see_another_moment() -> None:
    """Also one that was compiled before; and after it, or an error in it, the time of the clock again."""
    tokenizer = make_tokenizer("{{ strftime_now('%Y-%m-%d %H:%M:%S') }}")

    def render() -> str:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False))

    moments = [datetime(2026, 1, 31), datetime(1999, 12, 31, 23, 59, 59)]
    before = render()
    for moment in moments:
        with compat_transformers.templates_see(moment):
            assert render() == str(moment)
        with pytest.raises(KeyError), compat_transformers.templates_see(moment):
            raise KeyError
    assert before <= render() and render() not in map(str, moments)


def test_a_file_that_a_model_lacks_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert compat_transformers.find_file(str(tmp_path), "config.json", "main") == str(tmp_path / "config.json")
    assert compat_transformers.find_file(str(tmp_path), "model.safetensors", "main") is None
    with pytest.raises(OSError):
        compat_transformers.find_file(str(tmp_path / "absent"), "model.safetensors", "main")


def mixtral() -> MixtralConfig:
    return MixtralConfig(**TINY, num_local_experts=2, num_experts_per_tok=1)


def test_a_subclass_that_passes_for_its_base_has_the_same_conversions() -> None:
    class Own(MixtralForCausalLM):
        pass

    compat_transformers.pass_for(Own, MixtralForCausalLM)
    assert (Own.__name__, Own.__module__) == ("MixtralForCausalLM", MixtralForCausalLM.__module__)
    with torch.device("meta"):
        original, own = (get_model_conversion_mapping(kind(mixtral())) for kind in (MixtralForCausalLM, Own))
    assert original and list(map(str, own)) == list(map(str, original))


def test_tensors_go_to_the_names_of_checkpoints_and_back(tmp_path: Path) -> None:
    model = MixtralForCausalLM(mixtral())
    stored = compat_transformers.checkpoint_tensors(model, model.state_dict())
    assert stored.keys() != model.state_dict().keys(), "experts are fused into one tensor in the model only"
    names = compat_transformers.parameter_names(model, stored)
    assert set(names.values()) == model.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == model.state_dict().keys()
    saved = [name for path in tmp_path.glob("*.safetensors") for name in _names_in(path)]
    assert sorted(saved) == sorted(stored)


@pytest.mark.parametrize("share", [None, False, True])
def test_layers_that_run_again_in_backward_know_of_packing_what_they_knew(share: bool | None) -> None:
    """On a GPU backward is another thread's."""
    positions, seen = torch.tensor([[0, 1, 0, 1]]), []

    def layer(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(compat_transformers._told.share if hasattr(compat_transformers._told, "share") else None)
        assert (masking_utils.find_packed_sequence_indices(positions) is None) == (share is False)
        return hidden * hidden

    told = nullcontext() if share is None else compat_transformers.packing_known(share)
    with told:
        output = checkpoint(
            layer,
            torch.ones(1, requires_grad=True),
            use_reentrant=False,
            context_fn=compat_transformers.recompute_as_told,
        )
    thread = threading.Thread(target=output.backward)
    thread.start()
    thread.join()
    assert seen == [share, share]


def _names_in(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())

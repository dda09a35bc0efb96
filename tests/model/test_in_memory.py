"""A loaded model gives the tensors that its files would have, and takes the trained ones back."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_config
from transformers import AutoModelForCausalLM

from lopt_pp.errors import LoptError
from lopt_pp.model.in_memory import LoadedWeights, check_model, config_of, generation_of, write_back
from lopt_pp.model.weights import PretrainedWeights


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tensors_are_those_of_its_files(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(torch.bfloat16)
    model.name_or_path = "a-name"
    model.save_pretrained(tmp_path)
    files, loaded = PretrainedWeights(str(tmp_path)), LoadedWeights(model)
    names = list(files.files)
    # A tied head has its name here, too.
    assert set(names) <= loaded.files.keys() and len(loaded.files) - len(names) <= model.config.tie_word_embeddings
    assert loaded.formats(names) == files.formats(names)
    stored, given = files.read(names, dtype=torch.float32), loaded.read(names, dtype=torch.float32)
    assert all(torch.equal(stored[name], given[name]) for name in names)
    assert config_of(model).to_dict() == model.config.to_dict() | {"_name_or_path": "a-name"}
    assert generation_of(model).to_dict() == model.generation_config.to_dict()


def test_weights_come_back_in_their_dtype() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tie_word_embeddings=True)).to(torch.bfloat16)
    trained = {name: torch.rand(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    write_back(model, trained, ties_embeddings=False)
    assert not model.config.tie_word_embeddings
    for name, tensor in model.named_parameters(remove_duplicate=False):
        assert torch.equal(tensor, trained[name].to(torch.bfloat16)), name


def test_what_is_not_there_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(LoptError, match="model: .* is on the meta device, or on the disk: load it without device_map"):
        check_model(model)

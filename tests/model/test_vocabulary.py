"""Added tokens: embeddings are those of a whole model that `transformers` resizes, however it is cut."""

import json
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from forked import TORCHRUN, run
from in_process import COMMON, train
from safetensors.torch import load_file
from tiny import write_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import load_tokenizer, model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.vocabulary import AddedRows, grown
from lopt_pp.model.weights import PretrainedWeights

NEW = ["<|turn|>", "<|over|>"]
TIED = {"tie_word_embeddings": True}
NARROW = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Fewer dimensions than tokens: new rows are drawn. Otherwise they are the mean of the others."""


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", NARROW),
        ("llama", {"tie_word_embeddings": True} | NARROW),
        ("llama", {}),
        ("gpt2", {}),
        ("phi", NARROW),
    ],
)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_logits_are_those_of_a_whole_model_that_was_resized(
    family: str, changes: dict[str, object], num_stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "phi", {})  # Its output head has a bias.
    path = write_model(tmp_path / "model", family, vocab_size=45, **changes)
    flags = ModelConfig(str(path), added_tokens=NEW, resize_to_multiple_of=8)
    tokenizer = load_tokenizer(flags)
    before = AutoConfig.from_pretrained(path)
    config, added = grown(before, tokenizer, flags, seed=7)
    assert added == AddedRows(config.vocab_size, 7) and config.vocab_size % 8 == 0
    assert before.vocab_size < config.vocab_size >= len(tokenizer)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch.manual_seed(7)
    whole.resize_token_embeddings(config.vocab_size)
    first, second = whole.get_input_embeddings().weight[45:47]
    assert torch.equal(first, second) != (changes != {})
    model_class, specs = model_class_of(config), split_evenly(config.num_hidden_layers, num_stages)
    builder = BlockBuilder(model_class, config, check_split(model_class, config, specs), added=added)
    ids = torch.tensor([[1, 5, tokenizer.convert_tokens_to_ids(NEW[1]), 7]])
    hidden, logits = None, None
    with torch.no_grad():
        state = torch.get_rng_state()
        for spec in specs:
            block = builder.from_pretrained(spec, PretrainedWeights(str(path))).eval()
            output = block(input_ids=ids if spec.is_first else None, hidden_states=hidden)
            hidden, logits = output.hidden_states, output.logits
        assert torch.equal(torch.get_rng_state(), state)
        assert logits is not None and torch.equal(logits, whole(ids, use_cache=False).logits)


def test_what_has_a_row_already_changes_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", vocab_size=47)
    flags = ModelConfig(str(path), added_tokens=NEW)
    config = AutoConfig.from_pretrained(path)
    assert grown(config, load_tokenizer(flags), flags, 7) == (config, None)


def test_special_tokens_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    path = str(write_model(tmp_path / "model"))
    for flags in (ModelConfig(path, eos_token="<x>"), ModelConfig(path, pad_token="<x>")):
        with pytest.raises(LoptError, match="token <x> is not in the .*vocabulary; .* --added_tokens '<x>'"):
            load_tokenizer(flags)
    tokenizer = load_tokenizer(ModelConfig(path, eos_token=NEW[1], pad_token=NEW[0], added_tokens=NEW))
    assert (tokenizer.eos_token, tokenizer.pad_token) == (NEW[1], NEW[0])
    with pytest.raises(LoptError, match="--added_tokens '': expected a string that is not empty"):
        ModelConfig(path, added_tokens=[""])


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_run_saves_a_model_that_stops_at_its_new_token(tmp_path: Path) -> None:
    """In one process and in two; and a run goes on from a checkpoint at another cut."""
    write_model(tmp_path / "model", vocab_size=45, tie_word_embeddings=True)
    rows = [{"prompt": f"{n} is ", "completion": f"{NEW[0]}{n}"} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--max_steps 2 --save_steps 1 --local_objective next_token --backend gloo --added_tokens {' '.join(NEW)} "
    flags += f"--eos_token {NEW[1]} --pad_token {NEW[0]}"
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    train(tmp_path, one, flags)
    train(tmp_path, three, f"{flags} --split 1 --resume_from_checkpoint {one / 'checkpoint-1'}")
    command = ["-m", *TORCHRUN, "2", "-m", "lopt_pp.train", "--model_name_or_path", str(tmp_path / "model")]
    command += ["--train_file", str(tmp_path / "rows.jsonl"), "--output_dir", str(two), *COMMON.split(), *flags.split()]
    ended = run([sys.executable, *command])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = tensors(one)
    assert found.keys() == tensors(two).keys() == tensors(three).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(two).items())
    tokenizer = AutoTokenizer.from_pretrained(two)
    model = AutoModelForCausalLM.from_pretrained(two)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (NEW[1], NEW[0])
    assert model.config.vocab_size == len(tokenizer) == 47 == found["lm_head.weight"].shape[0]
    settings = GenerationConfig.from_pretrained(two)
    assert tokenizer.eos_token_id in settings.eos_token_id and settings.pad_token_id == tokenizer.pad_token_id

"""The ids of special tokens in the result are its tokenizer's, as TRL and `transformers` write them."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import write_model
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, trainer_utils

from lopt_pp.config.model import ModelConfig
from lopt_pp.model.pretrained import aligned_configs
from lopt_pp.model.special_tokens import align_special_tokens, end_of_turn

OPEN = """\
{% for message in messages %}{{ ('<|im_start|>' if message['role'] == 'user' else '<|pad|>') + message['content'] }}\
{% endfor %}"""
"""Like GLM's: what ends an answer is the beginning of the next message."""

TWO_ENDS = """\
{% for message in messages %}{{ message['content'] + ('<|im_end|>' if loop.last else '<|pad|>') }}{% endfor %}"""
"""Like that of gpt-oss: within a conversation an answer ends otherwise than at its end."""

PLAIN = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("special") / "model")


@pytest.fixture
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize(
    ("in_config", "in_generation"),
    [(2, 2), (1, 1), (2, 1), (1, 2), (None, None), ([1, 2], [1, 2]), ([1, 5], 7), (1, [7, 5]), (1, None)],
)
def test_the_ends_are_those_of_transformers(
    model: Path, tokenizer: PreTrainedTokenizerBase, in_config: object, in_generation: object
) -> None:
    config = AutoConfig.from_pretrained(model)
    config.eos_token_id = in_config
    generation = GenerationConfig(eos_token_id=in_generation, pad_token_id=7, bos_token_id=1)
    own, other = (copy.deepcopy((config, generation)) for _ in range(2))
    changes = align_special_tokens(*own, tokenizer)
    trainer_utils.align_special_tokens(SimpleNamespace(config=other[0], generation_config=other[1]), tokenizer)
    for ours, theirs in zip(own, other, strict=True):
        found, expected = ([ids] if isinstance(ids, int) else ids for ids in (ours.eos_token_id, theirs.eos_token_id))
        assert found == expected
        assert (ours.pad_token_id, ours.bos_token_id) == (0, 1)
    assert changes[-1] == "pad_token_id of generation_config.json from 7 to 0"
    assert align_special_tokens(*own, tokenizer) == []


def test_ids_without_an_embedding_are_left_out(model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """An embedding with a padding id beyond its rows cannot be made at all."""
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = tokenizer.pad_token_id
    align_special_tokens(config, generation := GenerationConfig(eos_token_id=2, pad_token_id=0), tokenizer)
    assert config.pad_token_id == generation.pad_token_id == 0


@pytest.mark.parametrize(
    ("template", "end"), [(OPEN, "<|im_start|>"), (TWO_ENDS, "<|im_end|>"), (PLAIN, None), ("{{ nothing.at }}", None)]
)
def test_the_token_that_ends_an_answer_is_found(
    tokenizer: PreTrainedTokenizerBase, template: str, end: str | None
) -> None:
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


def test_generation_stops_where_the_template_ends_an_answer(model: Path, tmp_path: Path) -> None:
    """The tokenizer's end of text may be another token, such as in Qwen's base models."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.eos_token = "<|pad|>"
    config = AutoConfig.from_pretrained(model)
    config.eos_token_id = 0
    own, generation, changes = aligned_configs(ModelConfig(str(tmp_path)), config, tokenizer)
    assert own.eos_token_id == 0 and generation.eos_token_id == [0, 2]
    assert changes == ["eos_token_id of generation_config.json from 0 to [0, 2]"]

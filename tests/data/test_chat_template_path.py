"""`--chat_template_path`: a file, or another tokenizer, in place of the model's own template."""

import copy
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast
from word_rows import (
    make_tokenizer,
)

from lopt_pp.data import DataConfig, with_chat_template
from lopt_pp.errors import LoptError


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_chat_template_from_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}")
    config = DataConfig(train_file=["a.json"], chat_template_path=str(tmp_path / "own.jinja"))
    assert with_chat_template(tokenizer, config) is tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False) == "user one "


def test_chat_template_of_another_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{% for m in messages %}{{ m.role + ' ' + m.content }}{% endfor %}"
    other.save_pretrained(tmp_path / "other")
    config = DataConfig(train_file=["a.json"], chat_template_path=str(tmp_path / "other"))
    assert with_chat_template(tokenizer, config).chat_template == other.chat_template
    other.add_tokens(["<turn>"], special_tokens=True)
    other.chat_template = "<turn>" + other.chat_template
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LoptError, match="uses tokens that the model's tokenizer lacks: <turn>; give a template"):
        with_chat_template(tokenizer, config)
    config = DataConfig(train_file=["a.json"], chat_template_path=str(tmp_path / "gone"))
    with pytest.raises(LoptError, match="gone is neither a file nor a tokenizer with a chat template"):
        with_chat_template(tokenizer, config)


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"{{ '\xe9' }}", "cannot be read as UTF-8: .* 0xe9"), (b"\n", "is empty; give a Jinja template")],
)
def test_a_file_that_cannot_be_a_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, content: bytes, error: str
) -> None:
    (tmp_path / "own.jinja").write_bytes(content)
    config = DataConfig(train_file=["a.json"], chat_template_path=str(tmp_path / "own.jinja"))
    with pytest.raises(LoptError, match=f"^--chat_template_path {tmp_path}/own.jinja {error}"):
        with_chat_template(tokenizer, config)


def test_a_byte_order_mark_is_not_part_of_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}", encoding="utf-8-sig")
    config = DataConfig(train_file=["a.json"], chat_template_path=str(tmp_path / "own.jinja"))
    assert with_chat_template(tokenizer, config).chat_template == "{{ messages[0].content }}"

"""Where tokens end at cuts, and that this takes time in proportion to the text."""

import random
from collections.abc import Iterable

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl_templates import source, tokenizer_for

from lopt_pp.data import answers
from lopt_pp.data.chat_template import ChatTemplate
from lopt_pp.data.cutting import Cutter, Span
from lopt_pp.data.encoding import RowEncoder

MERGES = (("a", "b"), ("ab", "ab"), ("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "Ġ"), ("b", "Ċ"), ("c", "a"))
PIECES = ["a", "b", "c", "ab", " ", "  ", "\n", "\n\n", "é", "'s ", "1", "<|im_start|>", "<|im_end|>", "<eos>"]


def byte_level() -> PreTrainedTokenizerFast:
    return tokenizer_for(source("qwen2_5"), MERGES)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """Puts a space before a text, or before each part of one between added tokens."""
    tokenizer = tokenizer_for(source("qwen2_5"), (*MERGES, ("▁", "a")))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "first": lambda: metaspace("first"), "always": lambda: metaspace("always")}


def drawn(number: int, pieces: list[str], length: int) -> tuple[str, list[Span]]:
    """A text, and spans of it."""
    draw = random.Random(number)
    text = "".join(draw.choices(pieces, k=length))
    ends = sorted(draw.sample(range(len(text) + 1), k=min(6, len(text)) // 2 * 2))
    return text, list(zip(ends[::2], ends[1::2], strict=True))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_cuts_are_those_of_encoding_each_beginning_of_the_text(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    cutter, slow = Cutter(tokenizer), Cutter(tokenizer)
    slow._cut = slow._cut_slowly  # type: ignore[method-assign]
    reached_over = compared = 0
    for number in range(300):
        text, spans = drawn(number, PIECES, length=20)
        got, wanted = cutter.at_cuts(text, spans), slow.at_cuts(text, spans)
        together = tokenizer.encode(text, add_special_tokens=False)
        reached_over += wanted[0] != together
        if kind == "byte level" or wanted[0] == together:
            assert got == wanted, (text, spans)
            compared += 1
    assert reached_over > 20 and compared >= 10


def test_cuts_far_from_an_added_token() -> None:
    tokenizer = byte_level()
    cutter, slow = Cutter(tokenizer), Cutter(tokenizer)
    slow._cut = slow._cut_slowly  # type: ignore[method-assign]
    for number in range(10):
        text, spans = drawn(number, PIECES[:10], length=3000)
        assert cutter.at_cuts(text, spans) == slow.at_cuts(text, spans)


def test_a_text_opens_once() -> None:
    assert Cutter(byte_level()).opening == []


class Counted:
    """How many characters were encoded and rendered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoded = self.rendered = 0
        encode, encode_all, render = Cutter._encode, Cutter._encode_all, ChatTemplate.render

        def counting_encode(cutter: Cutter, text: str) -> tuple[list[int], list[Span]]:
            self.encoded += len(text)
            return encode(cutter, text)

        def counting_encode_all(cutter: Cutter, texts: Iterable[str]) -> list[list[int]]:
            listed = list(texts)
            self.encoded += sum(map(len, listed))
            return encode_all(cutter, listed)

        def counting_render(template: ChatTemplate, *args: object, **options: object) -> str:
            text = render(template, *args, **options)  # type: ignore[arg-type]
            self.rendered += len(text)
            return text

        monkeypatch.setattr(Cutter, "_encode", counting_encode)
        monkeypatch.setattr(Cutter, "_encode_all", counting_encode_all)
        monkeypatch.setattr(ChatTemplate, "render", counting_render)


def long_conversation(number: int, with_tools: bool = False) -> list[dict[str, object]]:
    """Of so many answers; with tools, all but the last are calls after one question."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages: list[dict[str, object]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    for turn in range(number - 1):
        if with_tools:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": f"result {turn}"})
        else:
            messages.append({"role": "assistant", "content": f"answer {turn} is here"})
            messages.append({"role": "user", "content": f"question {turn} of this length"})
    return [*messages, {"role": "assistant", "content": "at last"}]


# One that TRL knows, the same changed so that it does not, and one without marks in TRL.
TEMPLATES = {
    "marked by TRL": lambda: source("qwen2_5"),
    "unknown": lambda: "{# changed #}" + source("qwen2_5"),
    "without marks": lambda: source("llama3_1"),
}


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_time_is_linear_in_the_turns(kind: str, with_tools: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_for(TEMPLATES[kind]())
    encoder = RowEncoder(tokenizer)
    work = []
    for number in (20, 40):
        counted = Counted(monkeypatch)
        row = encoder({"messages": long_conversation(number, with_tools)})
        monkeypatch.undo()
        assert row is not None and row.num_targets > 10 * number
        work.append((counted.encoded, counted.rendered))
        assert counted.encoded < 4 * len(str(tokenizer.decode(row.input_ids)))
    (encoded, rendered), (encoded_twice, rendered_twice) = work
    assert encoded_twice < 2.2 * encoded and rendered_twice <= 2.2 * rendered


@pytest.mark.parametrize("with_tools", [False, True])
@pytest.mark.parametrize("kind", ["unknown", "without marks"])
def test_neighbours_tell_the_same_as_all_before(kind: str, with_tools: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"messages": long_conversation(12, with_tools)}
    encoder = RowEncoder(tokenizer_for(TEMPLATES[kind]()))
    among_neighbours = encoder(row)
    monkeypatch.setattr(answers, "_MANY", 1000)
    assert encoder(row) == among_neighbours


def test_a_template_that_looks_far_back_is_not_taken_by_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It numbers the answers, so that neighbours tell other texts than the whole."""
    template = (
        "{% set n = namespace(i=0) %}{% for m in messages %}{% if m.role == 'assistant' %}{% set n.i = n.i + 1 %}"
        "<|im_start|>assistant\n{{ n.i }} {{ m.content }}<|im_end|>{% else %}<|im_start|>{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_for(template)
    row = RowEncoder(tokenizer)({"messages": long_conversation(12)})
    assert row is not None and not row.notes
    text = str(tokenizer.decode([label for label in row.labels if label != -100]))
    assert text.startswith("1 answer 0 is here<|im_end|>2 answer 1") and text.endswith("12 at last<|im_end|>")

"""A tokenizer of characters, chat templates, and messages for them."""

from collections.abc import Sequence
from string import ascii_letters, digits, punctuation

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lopt_pp.data.encoding import EncodedRow

BOS, START, END = "<s>", "<|im_start|>", "<|im_end|>"

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

MARKED = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}\
{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Like templates of reasoning models: what the last answer begins with is gone once the conversation goes on.
REWRITING = CHATML.replace(
    "+ message['content']", "+ ('T' if loop.last and message['role'] == 'assistant' else '') + message['content']"
)

QUESTION = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "ab"}
CHAT_PROMPT = (START, "user\nq", END, "\n", START, "assistant\n")


def make_tokenizer(template: str | None = None, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """One token a character, but for the pair "ab"; a text starts with BOS; END is the end-of-sequence token."""
    vocab = [BOS, START, END, *ascii_letters, *digits, *punctuation, " ", "\n", "▁", "ab"]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocab)}, [("a", "b")]))
    tokenizer.add_special_tokens([BOS, START, END])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=template,
    )


def spell(parts: Sequence[str]) -> list[str]:
    """Special tokens and "ab" stay whole, anything else falls into characters."""
    return [token for part in parts for token in ([part] if part in (BOS, START, END, "ab") else part)]


def text_of(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> str:
    """The tokens of a row, with [[ ]] around those that count."""
    text, counts = "", False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if (label != -100) != counts:
            counts = not counts
            text += "[[" if counts else "]]"
        text += str(tokenizer.convert_ids_to_tokens(token))
    return text + ("]]" if counts else "")

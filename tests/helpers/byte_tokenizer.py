"""A tokenizer that encodes any text, and chat templates of several kinds for it."""

import functools

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PLAIN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
TEMPLATES = {
    "none": None,
    "plain": PLAIN + "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    "marked": "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<end>' }}{% endgeneration %}{% else %}{{ m['content'] + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    # As careless of what a message holds as the templates of real models are.
    "careless": PLAIN + "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '!' }}"
    "{{ m.tool_calls | length }}{{ 1 // (m.tool_calls | length - 1) }}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    "rewriting": "{{ messages | length }}" + PLAIN,
}


@functools.cache
def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, so that there is no text that it could not encode; and a special one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE({token: number for number, token in enumerate([*letters, "<end>"])}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", chat_template=template)

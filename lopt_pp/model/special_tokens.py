"""The ids of special tokens in a model's configs, brought in line with its tokenizer, so that generation stops.

A chat model is often made from a base model by giving its tokenizer another end of text; the configs beside the weights
still name the old one, and `generate` goes by these.
"""

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_ANSWER, _NEXT = "lopt-answer", "lopt-next"
"""Texts that no chat template has."""


def align_special_tokens(
    config: PreTrainedConfig, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Gives a model's configs the ids of its tokenizer's special tokens, as `transformers.Trainer` and TRL do.

    The tokenizer's end of text comes first among those at which generation stops; the others are kept. A token that the
    tokenizer does not name leaves what the configs say. Besides, generation stops at the token with which the chat
    template ends an answer. Ids that the model has no embedding for are left out: no model could be loaded with them.

    Args:
        config: of the model; changed.
        generation: of the model; changed.
        tokenizer: of the model.

    Returns:
        What was changed, such as `eos_token_id of generation_config.json from 256 to [258, 256]`.

    Source: `transformers.trainer_utils.align_special_tokens` (5.23); older versions also erase what the tokenizer does
    not name.
    """
    changes: list[str] = []
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        own = getattr(tokenizer, name)
        if own is None or not _is_embedded(own, config):
            continue
        several = name == "eos_token_id"
        before = _ids(getattr(config, name, None))
        if own not in before:
            is_list = several and isinstance(getattr(config, name, None), list)
            changes += _set(config, "config.json", name, [own, *before] if is_list else own)
        before = _ids(getattr(generation, name, None))
        if own not in before:
            changes += _set(generation, "generation_config.json", name, [own, *before] if several and before else own)
    end = end_of_turn(tokenizer)
    stops = _ids(generation.eos_token_id)
    if end is not None and end not in stops and _is_embedded(end, config):
        changes += _set(generation, "generation_config.json", "eos_token_id", [*stops, end] if stops else end)
    return changes


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the added token with which the chat template ends an answer; None where it has none, or no template.

    It is looked for after the last answer of a conversation, and where that is left open, before the message that
    follows it: GLM ends an answer with the `<|user|>` of the next message. Some templates end an answer otherwise in
    the middle of a conversation than at its end (gpt-oss), and a model that stopped there would break off its answers.
    """
    if not tokenizer.chat_template:
        return None
    asked = [{"role": "user", "content": "lopt-question"}, {"role": "assistant", "content": _ANSWER}]
    for messages in (asked, [*asked, {"role": "user", "content": _NEXT}]):
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception:  # A template may refuse any conversation, in any way: then it has nothing to say here.
            return None
        after = text.rpartition(_ANSWER)[2].partition(_NEXT)[0] if _ANSWER in text else ""
        added = set(tokenizer.get_added_vocab().values())
        found = [token for token in tokenizer.encode(after, add_special_tokens=False) if token in added]
        if found:
            return found[0]
    return None


def _is_embedded(token_id: int, config: PreTrainedConfig) -> bool:
    return 0 <= token_id < config.vocab_size


def _ids(value: int | Sequence[int] | None) -> list[int]:
    """One id, several or none, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else [own for own in value if own is not None]


def _set(target: Any, file: str, name: str, value: int | list[int]) -> list[str]:
    before = getattr(target, name, None)
    setattr(target, name, value)
    return [f"{name} of {file} from {before} to {value}"]


def pad_token_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> int:
    """Of the padding token, or another that the model has an embedding for: which one it is changes no loss."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None and token < num_embeddings)

"""What a finished model answers to a prompt."""

from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer

from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.location import explain


def open_pretrained(kind: Any, path: str, name: str, **options: object) -> Any:
    """What `kind.from_pretrained` gives.

    Args:
        kind: an auto class.
        path: of the model.
        name: that the user has given it.
        options: for `from_pretrained`.

    Raises:
        LoptError: it cannot be read.
    """
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise LoptError(f"{name}: {explain(name, first_line(error))}") from error


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, raw: bool) -> BatchEncoding:
    """The tokens that are to be gone on from, as a batch of one.

    Args:
        tokenizer: of the model.
        prompt: of the user.
        system: message before it.
        raw: whether the chat template, where there is one, is left out.

    Raises:
        LoptError: there is a system message and no chat template, or nothing to go on from.
    """
    if raw or not tokenizer.chat_template:
        if system is not None:
            raise LoptError("--system needs a chat template, which " + ("--raw leaves out" if raw else "is not there"))
        encoded = tokenizer(prompt, return_tensors="pt")
        if encoded["input_ids"].numel() == 0:
            raise LoptError("--prompt is empty: there is nothing to go on from")
        return encoded
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert isinstance(encoded, BatchEncoding)
    return encoded


def print_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: BatchEncoding,
    max_new_tokens: int,
    sampling: dict[str, float],
) -> None:
    """Prints the answer as its tokens come.

    Args:
        model: that answers, of `AutoModelForCausalLM`.
        tokenizer: of the model.
        prompt: of `encode`.
        max_new_tokens: longest answer.
        sampling: `temperature` and `top_p`; empty for the likeliest tokens.

    Raises:
        LoptError: the prompt has a token that the model has no embedding for, or prompt and answer are longer than its
            table of positions.
    """
    number = model.get_input_embeddings().weight.shape[0]
    if (largest := int(prompt["input_ids"].max())) >= number:
        raise LoptError(
            f"--prompt has the token id {largest}, which is outside the model's, from 0 to {number - 1}: the "
            f"tokenizer is another model's"
        )
    settings = {"temperature": None, "top_p": None, "top_k": None} | sampling
    try:
        model.generate(
            **{name: tensor.to(model.device) for name, tensor in prompt.items() if name != "token_type_ids"},
            max_new_tokens=max_new_tokens,
            do_sample=bool(sampling),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **settings,
        )
    except IndexError as error:  # Of an embedding of positions that ends.
        most = getattr(model.config, "max_position_embeddings", None)
        raise LoptError(
            f"the answer was broken off ({first_line(error)}): prompt and answer may have {most} tokens in all "
            f"(max_position_embeddings); lower --max_new_tokens"
        ) from error

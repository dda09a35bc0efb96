"""What a finished model answers to a prompt."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from jinja2 import TemplateError
from transformers import (
    BatchEncoding,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

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
    return encode_chat(tokenizer, [*messages, {"role": "user", "content": prompt}])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> BatchEncoding:
    """The tokens of a conversation that the model is to answer, as a batch of one.

    Args:
        tokenizer: of the model, with a chat template.
        messages: with `role` and `content`, the user's last.

    Raises:
        LoptError: the template refuses them, such as a system message where it knows none.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise LoptError(f"the model's chat template refuses the conversation: {first_line(error)}") from error
    assert isinstance(encoded, BatchEncoding)
    return encoded


def sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """What `generate` is told of how to draw.

    Args:
        temperature: 0 takes the likeliest token; None leaves it to the model's own settings.
        top_p: the mass of the likeliest tokens to draw from; None likewise.
    """
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature is None:
        return {} if top_p is None else {"do_sample": True, "top_p": top_p}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": None}


class _Printer(TextStreamer):
    """Prints an answer as its tokens come, and keeps it."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def print_answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: BatchEncoding,
    max_new_tokens: int,
    settings: Mapping[str, Any],
    must_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Prints the answer as its tokens come.

    Args:
        model: that answers, of `AutoModelForCausalLM`.
        tokenizer: of the model.
        prompt: of `encode`.
        max_new_tokens: longest answer.
        settings: of `sampling`.
        must_stop: whether the answer is to end with the token that has come.

    Returns:
        The answer.

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
    printer = _Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        model.generate(
            **{name: tensor.to(model.device) for name, tensor in prompt.items() if name != "token_type_ids"},
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=printer,
            stopping_criteria=StoppingCriteriaList([_Stop(must_stop)]),
            **settings,
        )
    except IndexError as error:  # Of an embedding of positions that ends.
        most = getattr(model.config, "max_position_embeddings", None)
        raise LoptError(
            f"the answer was broken off ({first_line(error)}): prompt and answer may have {most} tokens in all "
            f"(max_position_embeddings); lower --max_new_tokens"
        ) from error
    return printer.text


class _Stop(StoppingCriteria):
    def __init__(self, must_stop: Callable[[], bool]) -> None:
        self._must_stop = must_stop

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        stops = torch.full((input_ids.shape[0],), self._must_stop(), dtype=torch.bool, device=input_ids.device)
        return cast(torch.BoolTensor, stops)

"""`lopt-pp generate MODEL --prompt TEXT`: what a model answers, for a first look."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from lopt_pp.checkpoint.export import ordinary_model
from lopt_pp.commands.common import add_common, be_quiet, dtype_of
from lopt_pp.errors import LoptError, first_line
from lopt_pp.util.console import print_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser("lopt-pp generate", description=__doc__)
    parser.add_argument("model", help="directory or hub id of a model, or a checkpoint OUTPUT_DIR/checkpoint-STEP")
    parser.add_argument(
        "--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help="what to answer; one or more"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before the prompt, by the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token; above 0 draws"
    )
    parser.add_argument("--top_p", type=float, default=1.0, help="draws from the likeliest tokens of this mass only")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--raw", action="store_true", help="go on from the prompt as it is, without the chat template")
    add_common(parser)
    given = parser.parse_args(arguments)
    if given.max_new_tokens < 1 or given.temperature < 0 or not 0 < given.top_p <= 1:
        parser.error("--max_new_tokens is at least 1, --temperature at least 0, --top_p above 0 and at most 1")
    be_quiet()
    try:
        with ordinary_model(given.model, given.trust_remote_code) as path:
            tokenizer = open_pretrained(AutoTokenizer, path, given.model, trust_remote_code=given.trust_remote_code)
            prompts = [encode(tokenizer, prompt, given.system, given.raw) for prompt in given.prompt]
            model = open_pretrained(
                AutoModelForCausalLM,
                path,
                given.model,
                dtype=dtype_of(given.dtype, given.device),
                trust_remote_code=given.trust_remote_code,
            ).to(given.device)
        drawing = {"temperature": given.temperature, "top_p": given.top_p} if given.temperature > 0 else {}
        for text, prompt in zip(given.prompt, prompts, strict=True):
            if len(prompts) > 1:
                print(f"> {text}", flush=True)
            transformers.set_seed(given.seed)
            answer(model, tokenizer, prompt, given.max_new_tokens, drawing)
    except LoptError as error:
        print_error(str(error))
        return 1
    return 0


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
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise LoptError(f"{name}: {first_line(error)}") from error


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


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: BatchEncoding,
    max_new_tokens: int,
    drawing: dict[str, float],
) -> None:
    """Prints the answer as its tokens come.

    Args:
        model: that answers, of `AutoModelForCausalLM`.
        tokenizer: of the model.
        prompt: of `encode`.
        max_new_tokens: longest answer.
        drawing: settings of sampling; empty for the likeliest tokens.
    """
    settings = {"temperature": None, "top_p": None, "top_k": None} | drawing
    model.generate(
        **{name: tensor.to(model.device) for name, tensor in prompt.items() if name != "token_type_ids"},
        max_new_tokens=max_new_tokens,
        do_sample=bool(drawing),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **settings,
    )


if __name__ == "__main__":
    sys.exit(main())

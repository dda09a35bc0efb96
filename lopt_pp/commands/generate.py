"""`lopt-pp generate MODEL --prompt TEXT`: what a model answers, for a first look."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lopt_pp.commands.answering import add_answering, open_answering, read_answering
from lopt_pp.commands.common import CommandParser

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    missing = 'the text to answer goes behind it: lopt-pp generate MODEL --prompt "TEXT"'
    parser = CommandParser("lopt-pp generate", description=__doc__, missing=missing)
    parser.add_argument(
        "--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help="what to answer; one or more"
    )
    parser.add_argument("--raw", action="store_true", help="go on from the prompt as it is, without the chat template")
    add_answering(parser, max_new_tokens=256, temperature=0.0, seed=0)
    given = read_answering(parser, arguments)
    _run(given)
    return 0


def _run(given: argparse.Namespace) -> None:
    answering, prompts = open_answering(given, lambda tokenizer: _encoded(tokenizer, given))
    from transformers import set_seed

    for text, prompt in zip(given.prompt, prompts, strict=True):
        if len(prompts) > 1:
            print(f"> {text}", flush=True)
        set_seed(given.seed)
        answering.answer(prompt)


def _encoded(tokenizer: "PreTrainedTokenizerBase", given: argparse.Namespace) -> "list[BatchEncoding]":
    from lopt_pp.evaluation.answers import encode

    return [encode(tokenizer, prompt, given.system, given.raw) for prompt in given.prompt]

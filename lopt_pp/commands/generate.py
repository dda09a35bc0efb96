"""`lopt-pp generate MODEL --prompt TEXT`: what a model answers, for a first look."""

import argparse
from collections.abc import Sequence

from lopt_pp.commands.answering import add_answering, pretrained, read_answering
from lopt_pp.commands.common import CommandParser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp generate", description=__doc__)
    parser.add_argument(
        "--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help="what to answer; one or more"
    )
    parser.add_argument("--raw", action="store_true", help="go on from the prompt as it is, without the chat template")
    add_answering(parser, max_new_tokens=256, temperature=0.0, seed=0)
    given = read_answering(parser, arguments)
    _run(given)
    return 0


def _run(given: argparse.Namespace) -> None:
    with pretrained(given) as opened:
        from transformers import set_seed

        from lopt_pp.evaluation.answers import encode, print_answer, sampling

        tokenizer = opened.tokenizer()
        # Before the model, which takes long to load: a prompt may be unusable.
        prompts = [encode(tokenizer, prompt, given.system, given.raw) for prompt in given.prompt]
        model = opened.model()
    settings = sampling(given.temperature, given.top_p)
    for text, prompt in zip(given.prompt, prompts, strict=True):
        if len(prompts) > 1:
            print(f"> {text}", flush=True)
        set_seed(given.seed)
        print_answer(model, tokenizer, prompt, given.max_new_tokens, settings)

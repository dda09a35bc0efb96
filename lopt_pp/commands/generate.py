"""`lopt-pp generate MODEL --prompt TEXT`: what a model answers, for a first look."""

import argparse
from collections.abc import Sequence
from os.path import expanduser

from lopt_pp.commands.common import CommandParser, add_common, be_quiet, device_and_dtype
from lopt_pp.errors import LoptError
from lopt_pp.util.console import print_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp generate", description=__doc__)
    parser.add_argument(
        "model", type=expanduser, help="directory or hub id of a model, or a checkpoint OUTPUT_DIR/checkpoint-STEP"
    )
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
    given = parser.read(arguments)
    if given.max_new_tokens < 1 or given.temperature < 0 or not 0 < given.top_p <= 1:
        parser.error("--max_new_tokens is at least 1, --temperature at least 0, --top_p above 0 and at most 1")
    try:
        _run(given)
    except LoptError as error:
        print_error(str(error))
        return 1
    return 0


def _run(given: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from lopt_pp.checkpoint.export import ordinary_model
    from lopt_pp.evaluation.answers import encode, open_pretrained, print_answer

    be_quiet()
    device, dtype = device_and_dtype(given)
    trust = {"trust_remote_code": given.trust_remote_code}
    with ordinary_model(given.model, given.trust_remote_code) as path:
        tokenizer = open_pretrained(AutoTokenizer, path, given.model, **trust)
        # Before the model, which takes long to load: a prompt may be unusable.
        prompts = [encode(tokenizer, prompt, given.system, given.raw) for prompt in given.prompt]
        model = open_pretrained(AutoModelForCausalLM, path, given.model, dtype=dtype, **trust).to(device)
    sampling = {"temperature": given.temperature, "top_p": given.top_p} if given.temperature > 0 else {}
    for text, prompt in zip(given.prompt, prompts, strict=True):
        if len(prompts) > 1:
            print(f"> {text}", flush=True)
        set_seed(given.seed)
        print_answer(model, tokenizer, prompt, given.max_new_tokens, sampling)

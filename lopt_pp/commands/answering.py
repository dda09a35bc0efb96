"""What `generate` and `chat` share: the flags of an answer, and the model that gives it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from os.path import expanduser
from typing import TYPE_CHECKING, Any, TypeVar

from lopt_pp.checkpoint.named import check_model_or_checkpoint
from lopt_pp.commands.common import CommandParser, add_common, be_quiet, device_and_dtype, say

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

T = TypeVar("T")


def add_answering(parser: CommandParser, max_new_tokens: int, temperature: float | None, seed: int | None) -> None:
    """Adds the model, and the flags that say how it is run and answers.

    Args:
        parser: of the command.
        max_new_tokens: default of that flag.
        temperature: likewise; None leaves it to the model's own settings.
        seed: likewise; None draws another one each time.
    """
    own = "the model's own settings"
    parser.add_argument(
        "model",
        type=expanduser,
        metavar="MODEL",
        help="directory or hub id of a model, or a checkpoint OUTPUT_DIR/checkpoint-STEP",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before the prompt, by the chat template")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=max_new_tokens,
        help=f"longest answer in tokens (default: {max_new_tokens})",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0 takes the likeliest token; above 0 draws (default: {own if temperature is None else temperature})",
    )
    parser.add_argument("--top_p", type=float, help="draws from the likeliest tokens of this mass only")
    another = "another each time" if seed is None else seed
    parser.add_argument("--seed", type=int, default=seed, help=f"of what is drawn (default: {another})")
    add_common(parser)


def read_answering(parser: CommandParser, arguments: Any) -> argparse.Namespace:
    """Reads a command line; leaves the program where its numbers cannot be used."""
    given = parser.read(arguments)
    temperature, top_p = given.temperature, given.top_p
    if given.max_new_tokens < 1 or (temperature or 0) < 0 or not (top_p is None or 0 < top_p <= 1):
        parser.error("--max_new_tokens is at least 1, --temperature at least 0, --top_p above 0 and at most 1")
    return given


@dataclass(frozen=True)
class Answering:
    """A model that answers.

    Attributes:
        model: of `AutoModelForCausalLM`.
        tokenizer: of the model.
        given: the flags.
    """

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    given: argparse.Namespace

    def answer(self, prompt: "BatchEncoding", must_stop: Callable[[], bool] = lambda: False) -> str:
        """Prints the answer as its tokens come; see `lopt_pp.evaluation.answers.print_answer`."""
        from lopt_pp.evaluation.answers import print_answer, sampling

        settings = sampling(self.given.temperature, self.given.top_p)
        return print_answer(self.model, self.tokenizer, prompt, self.given.max_new_tokens, settings, must_stop)


def open_answering(given: argparse.Namespace, prepare: "Callable[[PreTrainedTokenizerBase], T]") -> tuple[Answering, T]:
    """Loads the model that the flags name; of a checkpoint it is made meanwhile.

    Args:
        given: the flags.
        prepare: is called before the model is loaded, which takes long: for what it may refuse.

    Returns:
        The model, and what `prepare` has returned.

    Raises:
        LoptError: there is none.
    """
    check_model_or_checkpoint(given.model)
    say()
    from lopt_pp.checkpoint.export import ordinary_model

    be_quiet()
    with ordinary_model(given.model, given.trust_remote_code) as path:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from lopt_pp.evaluation.answers import open_pretrained

        of = {"path": path, "name": given.model, "trust_remote_code": given.trust_remote_code}
        tokenizer = open_pretrained(AutoTokenizer, **of)
        prepared = prepare(tokenizer)
        device, dtype = device_and_dtype(given)
        model = open_pretrained(AutoModelForCausalLM, **of, dtype=dtype).to(device)
    return Answering(model, tokenizer, given), prepared

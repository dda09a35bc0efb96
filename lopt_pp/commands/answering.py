"""What `generate` and `chat` share: the flags of an answer, and the model that gives it."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from lopt_pp.checkpoint.named import check_model_or_checkpoint
from lopt_pp.commands.common import CommandParser, add_common, be_quiet, device_and_dtype, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
class Pretrained:
    """A model that is to answer, not loaded yet.

    Attributes:
        path: that its library reads it from.
        given: the flags.
    """

    path: str
    given: argparse.Namespace

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Of the model.

        Raises:
            LoptError: it cannot be read.
        """
        from transformers import AutoTokenizer

        return self._open(AutoTokenizer)

    def model(self) -> Any:
        """Takes long to load, so after what may be refused before.

        Raises:
            LoptError: it cannot be read.
        """
        from transformers import AutoModelForCausalLM

        device, dtype = device_and_dtype(self.given)
        return self._open(AutoModelForCausalLM, dtype=dtype).to(device)

    def _open(self, kind: Any, **options: object) -> Any:
        from lopt_pp.evaluation.answers import open_pretrained

        trust = self.given.trust_remote_code
        return open_pretrained(kind, self.path, self.given.model, trust_remote_code=trust, **options)


@contextmanager
def pretrained(given: argparse.Namespace) -> Iterator[Pretrained]:
    """The model that the flags name, to be loaded while the context lasts; of a checkpoint it is made meanwhile.

    Raises:
        LoptError: there is none.
    """
    check_model_or_checkpoint(given.model)
    say()
    from lopt_pp.checkpoint.export import ordinary_model

    be_quiet()
    with ordinary_model(given.model, given.trust_remote_code) as path:
        yield Pretrained(path, given)

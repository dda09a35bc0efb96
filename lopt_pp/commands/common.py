"""Flags and settings that several commands share.

PyTorch and Transformers take seconds to import, and neither `--help` nor mistakes in the flags are to wait for them. So
here and in each command they are imported by the functions that need them, once the flags are parsed.
"""

import argparse
import difflib
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_pp.config.arguments import OwnParser
from lopt_pp.errors import first_line
from lopt_pp.util.console import print_note, print_warning
from lopt_pp.util.log_lines import quiet_libraries
from lopt_pp.util.screen import is_terminal

if TYPE_CHECKING:
    import torch


class CommandParser(OwnParser):
    """A parser that takes flags with dashes and with underscores, and says in one line what is wrong.

    Args:
        elsewhere: what is said of a flag that this command does not have; by default the nearest name is.
        missing: what is said besides where something that is required is not given.
    """

    def __init__(self, *args: Any, elsewhere: str = "", missing: str = "", **kwargs: Any) -> None:
        self._names: list[str] = []
        super().__init__(*args, **kwargs)
        self._elsewhere, self._missing = elsewhere, missing

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Adds a flag or a value, as argparse does."""
        action = super().add_argument(*args, **kwargs)
        self._names += action.option_strings
        return action

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Reads a command line; leaves the program where it cannot be used."""
        words = [self._as_defined(word) for word in (sys.argv[1:] if arguments is None else arguments)]
        given, unknown = self.parse_known_args(words)
        if unknown:
            name = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(name, [own for own in self._names if own != "--help"], n=1)
            hint = f"did you mean {close[0]}?" if close else self._elsewhere or "see --help"
            self.error(f"unknown flag {unknown[0]}; {hint}")
        return given

    def error(self, message: str) -> typing.NoReturn:
        """Says what is wrong, and leaves the program."""
        if self._missing and message.startswith("the following arguments are required"):
            message += f"; {self._missing}"
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")

    def _as_defined(self, word: str) -> str:
        name, equals, value = word.partition("=")
        for own in (name.replace("_", "-"), f"--{name[2:].replace('-', '_')}"):
            if name.startswith("--") and name not in self._names and own in self._names:
                return own + equals + value
        return word


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What a model may be run, or its weights saved, in."""


def home_path(text: str) -> Path:
    """A path of the command line. A shell leaves `~` as it is in `--flag=~/x`, and in quotes."""
    return Path(text).expanduser()


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where and how a model is run."""
    parser.add_argument(
        "--device", type=_device, help="where to run it (default: cuda where PyTorch can use a GPU, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="to run it in; auto, the default, is float32 on a CPU and bfloat16 elsewhere",
    )
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds the flag without which no code of a model is run."""
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def _device(name: str) -> "torch.device":
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name} is not a device: {first_line(error)}") from error


def device_and_dtype(given: argparse.Namespace) -> "tuple[torch.device, torch.dtype]":
    """What `--device` and `--dtype` come to on this machine.

    Raises:
        LoptError: `--device` is a GPU that PyTorch cannot use.
    """
    import torch

    from lopt_pp.distributed.devices import check_gpu, choose_device

    device = given.device
    if device is not None and device.type == "cuda":
        check_gpu(device)
    if device is None:
        chosen = choose_device("auto", local_rank=0)
        if chosen.reason and torch.cuda.device_count() > 0:
            print_warning(f"the model runs on the CPU, since PyTorch cannot use the GPU: {chosen.reason}")
        device = torch.device(chosen.device)
    if given.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, getattr(torch, given.dtype)


LOADING = "loading PyTorch and Transformers"


def say(what: str = LOADING) -> None:
    """Tells whoever looks on what the command does next, which takes long; nobody where there is no terminal."""
    if is_terminal(sys.stderr):
        print_note(what)


def be_quiet() -> None:
    """Leaves the terminal to the command's own output. `datasets`, if imported, has bars on a terminal only."""
    import transformers

    quiet_libraries()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if (datasets := sys.modules.get("datasets")) is not None and not is_terminal(sys.stderr):
        datasets.disable_progress_bars()

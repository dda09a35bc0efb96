"""Flags and settings that several commands share.

PyTorch and Transformers take seconds to import, and neither `--help` nor mistakes in the flags are to wait for them. So
here and in each command they are imported by the functions that need them, once the flags are parsed.
"""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lopt_pp.errors import first_line

if TYPE_CHECKING:
    import torch


def home_path(text: str) -> Path:
    """A path of the command line. A shell leaves `~` as it is in `--flag=~/x`, and in quotes."""
    return Path(text).expanduser()


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where and how a model is run."""
    parser.add_argument(
        "--device", type=_device, help="where to run it (default: cuda where PyTorch finds a GPU, else cpu)"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="to run it in; auto, the default, is float32 on a CPU and bfloat16 elsewhere",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def _device(name: str) -> "torch.device":
    import torch

    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name} is not a device: {first_line(error)}") from error


def device_and_dtype(given: argparse.Namespace) -> "tuple[torch.device, torch.dtype]":
    """What `--device` and `--dtype` come to on this machine."""
    import torch

    device = given.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if given.dtype == "auto":
        return device, torch.float32 if device.type == "cpu" else torch.bfloat16
    return device, getattr(torch, given.dtype)


def be_quiet() -> None:
    """Leaves the terminal to the command's own output."""
    import transformers

    for library in ("httpx", "huggingface_hub"):  # They tell of each try to reach the hub.
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

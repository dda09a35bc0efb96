"""Flags and settings that several commands share."""

import argparse

import torch
import transformers

from lopt_pp.errors import first_line


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where and how a model is run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=device, help=f"where to run it (default here: {device})")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="to run it in; auto, the default, is float32 on a CPU and bfloat16 elsewhere",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name} is no device: {first_line(error)}") from error


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `--dtype` on a device."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)


def be_quiet() -> None:
    """Leaves the terminal to the answers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

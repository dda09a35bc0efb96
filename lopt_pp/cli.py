"""The `lopt-pp` command."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

_DESCRIPTION = """\
Pipeline-parallel post-training of language models by local learning.

commands:
  train    post-train a model; under torchrun, one process per stage:
           torchrun --rdzv-backend lopt-pp --nproc-per-node 2 --no-python lopt-pp train FLAGS
           (lopt-pp train --help lists them)
  export   make the ordinary model of a checkpoint: lopt-pp export OUTPUT_DIR/checkpoint-500 MODEL
  report   make a page on a run, with curves, timeline and advice: lopt-pp report OUTPUT_DIR
  compare  make a page that overlays several runs: lopt-pp compare OUTPUT_DIR OUTPUT_DIR ...
"""

_MODULES = {"report": "insight.report", "compare": "insight.compare"}
"""Of commands that are not modules of the package itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "lopt-pp",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lopt-pp COMMAND FLAGS",
    )
    parser.add_argument("--version", action="version", version=version("lopt-pp"))
    parser.add_argument("command", choices=["train", "export", "report", "compare"], help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(arguments[:1]).command
    # Late, so that --help does not wait for torch.
    return importlib.import_module(f"lopt_pp.{_MODULES.get(command, command)}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())

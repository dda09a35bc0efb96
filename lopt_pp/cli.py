"""The `lopt-pp` command."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

_DESCRIPTION = """\
Pipeline-parallel post-training of language models by local learning.

commands:
  train    post-train a model; under torchrun, one process per stage:
           torchrun --nproc-per-node 2 --no-python lopt-pp train FLAGS   (lopt-pp train --help lists them)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "lopt-pp",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lopt-pp COMMAND FLAGS",
    )
    parser.add_argument("--version", action="version", version=version("lopt-pp"))
    parser.add_argument("command", choices=["train"], help=argparse.SUPPRESS)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = parser.parse_args(arguments[:1]).command
    assert command == "train"
    from lopt_pp.train import main as train  # Late, so that --help does not wait for torch.

    return train(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())

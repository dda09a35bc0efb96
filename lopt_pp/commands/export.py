"""`lopt-pp export CHECKPOINT OUT`: the ordinary model of a checkpoint."""

import argparse
from collections.abc import Sequence

from lopt_pp.commands.common import DTYPES, CommandParser, add_trust, be_quiet, home_path, say


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp export", description=__doc__)
    parser.add_argument(
        "checkpoint", type=home_path, metavar="CHECKPOINT", help="directory of a checkpoint, OUTPUT_DIR/checkpoint-STEP"
    )
    parser.add_argument(
        "output", type=home_path, metavar="MODEL", help="directory for the model; must not hold one yet"
    )
    add_trust(parser)
    parser.add_argument(
        "--save_dtype",
        choices=DTYPES,
        default="auto",
        help="dtype of the model's weights; auto, the default, is the pretrained model's own, tensor by tensor",
    )
    given = parser.read(arguments)
    _run(given)
    print(f"the model of {given.checkpoint} is in {given.output}")
    return 0


def _run(given: argparse.Namespace) -> None:
    say()
    from lopt_pp.checkpoint.export import export

    be_quiet()
    export(given.checkpoint, given.output, given.trust_remote_code, given.save_dtype)

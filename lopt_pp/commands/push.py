"""`lopt-pp push OUTPUT_DIR --hub_model_id NAME`: a model to the Hugging Face Hub."""

import argparse
import typing
from collections.abc import Sequence

from lopt_pp.commands.common import CommandParser, add_trust, be_quiet, home_path
from lopt_pp.config.hub import HubConfig

_STRATEGIES = typing.get_args(typing.get_type_hints(HubConfig)["hub_strategy"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser("lopt-pp push", description=__doc__)
    parser.add_argument(
        "model",
        type=home_path,
        help="output directory of a run, another model's directory, or a checkpoint OUTPUT_DIR/checkpoint-STEP",
    )
    parser.add_argument(
        "--hub_model_id", help="OWNER/NAME of the repository, or NAME for one of yours (default: the directory's name)"
    )
    parser.add_argument(
        "--hub_private_repo", choices=["true", "false"], help="whether a repository that is made is private"
    )
    parser.add_argument(
        "--hub_strategy",
        choices=_STRATEGIES,
        default="end",
        help="checkpoint: the newest checkpoint as well; all_checkpoints: all of them (default: the model alone)",
    )
    parser.add_argument("--hub_token", help="to write with (default: that of `hf auth login`, or HF_TOKEN)")
    parser.add_argument("--hub_revision", help="branch, which is made if it is not there (default: main)")
    parser.add_argument("--commit_message", default="Upload model", help="of the commit (default: Upload model)")
    add_trust(parser)
    given = parser.read(arguments)
    print(f"the model is at {_run(given)}")
    return 0


def _run(given: argparse.Namespace) -> str:
    config = HubConfig(
        push_to_hub=True,
        hub_model_id=given.hub_model_id,
        hub_strategy=given.hub_strategy,
        hub_private_repo=None if given.hub_private_repo is None else given.hub_private_repo == "true",
        hub_token=given.hub_token,
        hub_revision=given.hub_revision,
    )
    from lopt_pp.hub.push import push

    be_quiet()
    return push(given.model, config, given.commit_message, given.trust_remote_code)

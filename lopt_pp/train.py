"""One process of a training run, from the command line: what torchrun starts.

lopt-pp train FLAGS                                             starts the processes by itself
torchrun --nproc-per-node 2 -m lopt_pp.train FLAGS              has torchrun start them
"""

import os
import signal
import sys
from collections.abc import Sequence

from lopt_pp.config.parser import parse_run
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.slurm import rank_and_size
from lopt_pp.errors import LoptError
from lopt_pp.util.console import print_error, print_note, print_warning
from lopt_pp.util.log_lines import set_up_logging
from lopt_pp.util.process import STOPPED_STATUS, ends_at_ctrl_c

_USAGE = "torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train [RUN_YAML] FLAGS"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a training in this process, or this process's part of one.

    Returns:
        The exit status. 0: the model is there. 1: the run failed. 2: unusable flags. 75: a signal has stopped the run,
        which can go on from its checkpoint; under torchrun 0, since it takes all others for failures and starts anew.
    """
    try:
        _, processes = rank_and_size()
        config, flags = parse_run(sys.argv[1:] if arguments is None else arguments, usage=_USAGE, warn=_warn)
        if flags.nproc not in (None, processes):
            raise LoptError(
                f"--nproc {flags.nproc}: the processes are started already, {processes} of them, and this is one; "
                f"leave the flag out, or start the run by lopt-pp train"
            )
        return train(config)
    except LoptError as error:  # All processes have the same flags, and the same to say of them.
        if _speaks():
            print_error(str(error))
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def main_of_launched(arguments: Sequence[str]) -> int:
    """What a process of `lopt-pp train` runs, which has read the same flags before, and warned of them.

    Returns:
        The exit status.
    """
    restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restart > 0 and _speaks():
        print_note(f"a process has failed: the run is started again ({restart} of --max_restarts {_max_restarts()})")
    try:
        config, _ = parse_run(arguments, warn=lambda message: None)
        with ends_at_ctrl_c():
            return train(config)
    except LoptError as error:
        if _speaks():
            print_error(str(error))
        return 2


def _max_restarts() -> str:
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "")


def _speaks() -> bool:
    """Whether this process is the one of its machine that says what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _warn(message: str) -> None:
    if _speaks():
        print_warning(message)


def train(config: Config) -> int:
    """Trains; returns the exit status, as `main` does.

    Raises:
        LoptError: the processes that there are do not fit the config, or cannot join each other.
    """
    # Late, so that --help and a mistake in a flag do not wait for torch.
    from lopt_pp.training.trainer import RunError, Trainer

    trainer = Trainer(config)
    set_up_logging(trainer.name)
    try:
        has_finished = trainer.train()
    except RunError as error:
        print_error(str(error))
        return 1
    return 0 if has_finished or "TORCHELASTIC_RUN_ID" in os.environ else STOPPED_STATUS


if __name__ == "__main__":
    sys.exit(main())

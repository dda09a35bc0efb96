"""`torchrun --nproc-per-node 2 -m lopt_pp.train FLAGS`: a training run from the command line."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from lopt_pp.config.parser import parse_config
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError
from lopt_pp.util.console import print_error, print_warning
from lopt_pp.util.process import STOPPED_STATUS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a training from the command line.

    Returns:
        The exit status. 0: the model is there. 1: the run failed. 2: unusable flags. 75: a signal has stopped the run,
        which can go on from its checkpoint; under torchrun 0, since it takes all others for failures and starts anew.
    """
    try:
        return _train(parse_config(sys.argv[1:] if arguments is None else arguments, warn=_warn))
    except LoptError as error:  # All processes have the same flags, and the same to say of them.
        if _speaks():
            print_error(str(error))
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _speaks() -> bool:
    """Whether this process is the one of its machine that says what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _warn(message: str) -> None:
    if _speaks():
        print_warning(message)


def _train(config: Config) -> int:
    # Late, so that --help and a mistake in a flag do not wait for torch.
    from lopt_pp.training.trainer import RunError, Trainer

    trainer = Trainer(config)
    _set_up_logging(trainer.name)
    try:
        has_finished = trainer.train()
    except RunError as error:
        print_error(str(error))
        return 1
    return 0 if has_finished or "TORCHELASTIC_RUN_ID" in os.environ else STOPPED_STATUS


def _set_up_logging(name: str) -> None:
    """Log lines on standard error that say which stage speaks."""
    import transformers

    logging.basicConfig(format=f"[{name}] %(message)s", level=logging.INFO, force=True)
    for library in ("transformers", "datasets", "httpx", "huggingface_hub", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())

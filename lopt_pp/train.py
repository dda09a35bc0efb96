"""`torchrun --nproc-per-node 2 -m lopt_pp.train FLAGS`: a training run from the command line."""

import functools
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import transformers
from torch.distributed import Store

from lopt_pp.config import Config, parse_config
from lopt_pp.course import ask_to_stop
from lopt_pp.distributed import World, connect, rank_and_size
from lopt_pp.errors import LoptError
from lopt_pp.guard import Guard, complain
from lopt_pp.resume import LATEST
from lopt_pp.run import Run
from lopt_pp.saving import holds_whole_model
from lopt_pp.stage import NotFiniteError

logger = logging.getLogger(__name__)

STOPPED_STATUS = 75
"""Of a process that a signal has stopped in good order: `EX_TEMPFAIL` of sysexits.h, "try again later"."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a training from the command line.

    Returns:
        The exit status. 0: the model is there. 1: the run failed. 2: unusable flags. 75: a signal has stopped the run,
        which can go on from its checkpoint; under torchrun 0, since it takes all others for failures and starts anew.
    """
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        topology = config.topology(rank_and_size()[1])
        with connect(config.pipeline) as world, Guard(world, topology) as guard:
            _set_up_logging(topology.name_of(world.rank))
            is_prepared = threading.Event()
            guard.stop = functools.partial(_stop, world.connection(timedelta(minutes=1)), is_prepared)
            try:
                if _is_done(config, world):
                    return 0
                run = Run(config, world)
                guard.abandon = run.abandon
                is_prepared.set()
                return 0 if run.train() or "TORCHELASTIC_RUN_ID" in os.environ else STOPPED_STATUS
            except LoptError as error:
                guard.fail(str(error), keep=isinstance(error, NotFiniteError) and run.keeps_last_good)
                return 1
    except LoptError as error:  # All processes have the same flags, and the same to say of them.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _stop(store: Store, is_prepared: threading.Event, number: signal.Signals) -> bool:
    """Has the run end after the step at hand; whoever presses Ctrl-C before the first one does not want to wait."""
    if number == signal.SIGINT and not is_prepared.is_set():
        return False
    try:
        ask_to_stop(store, number.name)
    except RuntimeError:
        return False  # The store is gone, and with it whoever could be asked.
    logger.info("%s: the run stops when the step at hand is done", number.name)
    return True


def _is_done(config: Config, world: World) -> bool:
    """Whether a run that is to go on has come to its end already. All must call this."""
    if world.rank == 0:
        goes_on = config.checkpoint.resume_from_checkpoint == LATEST or world.is_restart
        path = Path(config.run.output_dir)
        is_done = goes_on and not config.run.overwrite_output_dir and holds_whole_model(path)
        if is_done:
            logger.info("%s has the trained model already; --overwrite_output_dir trains on from the checkpoint", path)
        world.store.set("is done", str(is_done))
    return world.store.get("is done").decode() == str(True)


def _set_up_logging(name: str) -> None:
    """Log lines on standard error that say which stage speaks."""
    logging.basicConfig(format=f"[{name}] %(message)s", level=logging.INFO, force=True)
    for library in ("transformers", "datasets", "httpx", "huggingface_hub", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())

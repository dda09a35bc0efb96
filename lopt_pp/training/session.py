"""Runs a training in this process, joined to the others and watched over: what a `Trainer` does in `train`.

SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop the run in good order meanwhile, where this is the main thread. A failure ends
all processes where there are several, and is raised where there is one.
"""

import logging
import signal
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from lopt_pp.config.topology import Topology
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.shutdown import ask_to_stop, await_end
from lopt_pp.distributed.watchdog import Watchdog
from lopt_pp.distributed.world import Failure, World, connect
from lopt_pp.errors import LoptError, NotFiniteError
from lopt_pp.training.finish import RunFinalizer
from lopt_pp.util.determinism import full_determinism, tf32
from lopt_pp.util.files import missing_directories, remove_empty
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)

T = TypeVar("T")

Work = Callable[[World, Callable[[RunFinalizer], None], ExitStack], T]
"""What is done: given this process, what is told when the run is prepared, and what is closed at the end."""


class RunError(LoptError):
    """A run has failed; `__cause__` is the error that it failed with."""


def run_watched(config: Config, topology: Topology, work: Work[T]) -> T:
    """Joins the processes, and does some work while they are watched over. All processes must call this.

    Args:
        config: the flags.
        topology: of the run.
        work: it.

    Raises:
        RunError: the work has failed, and this process is the only one.
        LoptError: the processes cannot join each other.
    """
    with connect(config.pipeline) as world, Watchdog(world, topology) as watchdog, ExitStack() as held:
        stop, missing = _Stop(world, topology.name_of(world.rank)), missing_directories(Path(config.run.output_dir))

        def let_go() -> None:
            held.close()
            remove_empty(missing)  # A start that is refused leaves no directory behind.

        watchdog.abandon = lambda failure: let_go()
        watchdog.stop = stop
        try:

            def on_prepared(finalizer: RunFinalizer) -> None:
                def abandon(failure: Failure) -> None:
                    finalizer.abandon(failure)
                    let_go()

                watchdog.abandon = abandon
                stop.finalizer = finalizer

            with full_determinism(config.stage.full_determinism), tf32(config.stage.tf32):
                return work(world, on_prepared, held)
        except LoptError as error:
            watchdog.fail(str(error), keep=isinstance(error, NotFiniteError) and error.keeps_weights)
            raise RunError(str(error)) from error
        finally:
            let_go()


class _Stop:
    """Has the run end in good order when a signal comes, and says how far it still goes.

    Args:
        world: this process.
        name: of this process in messages.
    """

    def __init__(self, world: World, name: str) -> None:
        # Two connections, since one waits; the other is for a thread that a second signal must not find waiting.
        self._asks, self._waits = world.connection(timedelta(minutes=1)), world.connection()
        self._name = name
        self._is_asked = False
        self.finalizer: RunFinalizer | None = None
        """Of the run, once it is prepared."""

    def __call__(self, number: signal.Signals) -> bool:
        """Whether the run will stop; whoever presses Ctrl-C before the first step does not want to wait for it."""
        if number == signal.SIGINT and self.finalizer is None:
            return False
        try:
            is_first = ask_to_stop(self._asks, number.name)
        except RuntimeError:
            return False  # The store is gone, and with it whoever could be asked.
        if not is_first:
            return True
        again = "; another one ends it at once" if number == signal.SIGINT else ""
        logger.info("%s: the run is asked to stop%s", number.name, again)
        if self.finalizer is not None and not self._is_asked:
            self._is_asked = True
            in_background(self._say_when, self.finalizer)
        return True

    def _say_when(self, finalizer: RunFinalizer) -> None:
        end = await_end(self._waits)
        if end is None:
            logger.info("the steps of the run are done; it ends by itself")
            return
        left = max(0, end - finalizer.steps_done)
        left_in_words = {0: "no step is left", 1: "1 step is left"}.get(left, f"{left} steps are left")
        place = f"after step {end}" if end > 0 else "before its first step"
        logger.info("the run stops %s: %s for %s", place, left_in_words, self._name)

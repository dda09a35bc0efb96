"""Training from Python: what `python -m lopt_pp.train` does, for scripts of one's own."""

import logging
import signal
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from transformers import AutoModelForCausalLM, PreTrainedModel

from lopt_pp.checkpoint.output_dir import holds_whole_model
from lopt_pp.config.train_config import Config
from lopt_pp.data.presets import find_reader
from lopt_pp.distributed.shutdown import ask_to_stop, await_end
from lopt_pp.distributed.watchdog import Watchdog
from lopt_pp.distributed.world import Failure, World, connect, rank_and_size
from lopt_pp.errors import LoptError, NotFiniteError
from lopt_pp.objectives import local_objective_class
from lopt_pp.training.finish import RunFinalizer
from lopt_pp.training.run import run
from lopt_pp.util.determinism import full_determinism
from lopt_pp.util.files import missing_directories, remove_empty
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)


class RunError(LoptError):
    """A run has failed, and has said why on standard error; `__cause__` is the error that it failed with."""


class Trainer:
    """Trains a model: in this process alone, or in all processes of a script that torchrun has started.

    Every process makes one of the same config and calls `train`. What `train` logs goes to the logger `lopt_pp`.

    Args:
        config: of `load_config`.

    Attributes:
        config: the same.
        rank: of this process; 0 where it is the only one.
        name: of this process in messages, such as `stage 0 (rank 0)`.

    Raises:
        LoptError: the processes that there are do not fit the config.
    """

    _has_joined: ClassVar[bool] = False
    """Whether this process has joined others before; the rendezvous serves once."""

    def __init__(self, config: Config) -> None:
        # Whether there is such code of the user's own.
        local_objective_class(config.objective)
        find_reader(config.data.dataset_mapping, config.data.dataset_text_field)
        self.config = config
        self.rank, self._size = rank_and_size()
        self._topology = config.topology(self._size)
        self.name = self._topology.name_of(self.rank)

    def train(self) -> bool:
        """Trains, and leaves the model in the output directory.

        SIGTERM, SIGINT and SIGUSR1 stop the run in good order meanwhile, where this is the main thread: Python lets no
        other one take signals. Where there are several processes, a failure ends all of them, with one line that says
        why, and `train` does not return.

        Returns:
            Whether the model is there; False where a signal has stopped the run, which can go on from its checkpoint.

        Raises:
            RunError: the run has failed, and this process is the only one.
            LoptError: the processes cannot join each other, or have done so before.
        """
        if self._size > 1 and Trainer._has_joined:
            raise LoptError("processes that torchrun has started can train once; start others for the next run")
        Trainer._has_joined = self._size > 1
        with (
            connect(self.config.pipeline) as world,
            Watchdog(world, self._topology) as watchdog,
            ExitStack() as held,
        ):
            stop, missing = _Stop(world, self.name), missing_directories(Path(self.config.run.output_dir))

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

                with full_determinism(self.config.stage.full_determinism):
                    return run(self.config, world, on_prepared, held)
            except LoptError as error:
                watchdog.fail(str(error), keep=isinstance(error, NotFiniteError) and error.keeps_weights)
                raise RunError(str(error)) from error
            finally:
                let_go()

    def model(self) -> PreTrainedModel:
        """The trained model, an ordinary one of `transformers`, read from the output directory to main memory.

        All of it, whatever the process has trained; so mostly one calls it on rank 0 alone.

        Raises:
            LoptError: it is not there.
        """
        path = Path(self.config.run.output_dir)
        if not holds_whole_model(path):
            raise LoptError(f"--output_dir {path} has no trained model; train() puts it there when it returns True")
        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=self.config.model.trust_remote_code)


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
            ask_to_stop(self._asks, number.name)
        except RuntimeError:
            return False  # The store is gone, and with it whoever could be asked.
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

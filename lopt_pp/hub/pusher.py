"""A run's pushes to the hub, by rank 0: those of its checkpoints in processes of their own, and that of its model.

A checkpoint is turned into an ordinary model before it is pushed. That is done in another process, since it must not
take time, random numbers or memory of a GPU from the training in this one.
"""

import logging
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from lopt_pp.checkpoint.output_dir import PUSHED, complete_checkpoints
from lopt_pp.distributed.shutdown import RunLength
from lopt_pp.hub.repository import PushError, Repository
from lopt_pp.metrics.records import Record
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)

LAST = "last-checkpoint"
"""The folder of the repository that has the newest checkpoint, as the one of `transformers`."""


def folder_of(checkpoint: Path, strategy: str) -> str | None:
    """The folder of the repository that a checkpoint goes to; None where it is not pushed.

    Args:
        checkpoint: its directory, `checkpoint-STEP`.
        strategy: of `--hub_strategy`.
    """
    return {"checkpoint": LAST, "all_checkpoints": checkpoint.name}.get(strategy)


def step_of(checkpoint: Path) -> str:
    """After which step a checkpoint was made, by its name, `checkpoint-STEP`."""
    return checkpoint.name.rpartition("-")[2]


class Pusher:
    """Pushes what a run leaves, as a `Listener` of its checkpoints; for its rank 0.

    Args:
        repository: that was opened.
        output_dir: of the run.
        strategy: `--hub_strategy`.
        always: `--hub_always_push`.
        length: of the run.
        card: the text of the model card after a number of steps.
        options: flags of `lopt-pp push` with which the run's models are made of its checkpoints.

    Attributes:
        repository: the same.
    """

    name = "the push to the hub"

    def __init__(
        self,
        repository: Repository,
        output_dir: Path,
        strategy: str,
        always: bool,
        length: RunLength,
        card: Callable[[int], str],
        options: tuple[str, ...] = (),
    ) -> None:
        self.repository, self._output_dir = repository, output_dir
        self._strategy, self._always, self._length = strategy, always, length
        self._card, self._options = card, options
        self._waiting: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._state = threading.Lock()
        """Held by whoever looks at what follows, or changes it."""
        self._num_waiting = 0
        self._child: subprocess.Popen[str] | None = None
        self._is_over = False

    def step(self, step: int, records: Sequence[Record], replicas: Sequence[Sequence[Record]]) -> None:
        """Nothing is made of single steps."""

    def end(self) -> None:
        """`finish` and `wait` are what the end needs."""

    def saved(self, step: int) -> None:
        """Pushes what is made of the checkpoint of a step, in time. It is complete; may be called from any thread.

        The checkpoint of the last step is left to `finish`.
        """
        if self._strategy == "end" or self._length.is_last(step):
            return
        with self._state:
            if self._is_over or (self._num_waiting > 0 and not self._always):
                logger.info("step %d is not pushed: the push before it has not ended (see --hub_always_push)", step)
                return
            self._num_waiting += 1
        try:
            snapshot = self._snapshot(step)
        except OSError as error:  # It was removed meanwhile, being one too many.
            logger.warning("step %d is not pushed: %s: %s", step, error.filename, error.strerror)
            with self._state:
                self._num_waiting -= 1
            return
        self._waiting.put(snapshot)
        if self._thread is None:
            self._thread = in_background(self._push_all)

    def wait(self) -> None:
        """Waits for the pushes of checkpoints that have begun, or wait."""
        if self._thread is None:
            return
        if self._num_waiting > 0:
            logger.info("waiting for the push to %s", self.repository.name)
        self._waiting.put(None)
        self._thread.join()
        self._thread = None

    def finish(self) -> None:
        """Pushes the run's model, once all before it is pushed.

        Raises:
            PushError: the hub does not take it; the text says how to push it later.
        """
        self.wait()
        later = f"lopt-pp push {shlex.quote(str(self._output_dir))} {self.repository.flags}"
        logger.info("pushing the model to %s (if it is interrupted: %s)", self.repository.name, later)
        checkpoints = complete_checkpoints(self._output_dir)
        folder = folder_of(checkpoints[0], self._strategy) if checkpoints else None
        try:
            if folder is not None:
                message = f"Checkpoint after step {step_of(checkpoints[0])}"
                self.repository.push_checkpoint(checkpoints[0], folder, message)
            page = self.repository.push_model(self._output_dir, "End of training")
        except PushError as error:
            raise PushError(
                f"the model is in {self._output_dir}, but it could not be pushed to {error}; to push it later: {later}"
            ) from error
        logger.info("the model is at %s", page)

    def abandon(self) -> None:
        """Ends the push of a checkpoint that is going on, if any, and begins no other. For a run that has failed."""
        with self._state:
            self._is_over = True
            if self._child is not None:
                with suppress(OSError):
                    self._child.kill()
        shutil.rmtree(self._output_dir / PUSHED, ignore_errors=True)

    def _snapshot(self, step: int) -> Path:
        """A copy of a checkpoint, with a card, which stays when the run removes the checkpoint: links, where it can."""
        checkpoint = self._output_dir / f"checkpoint-{step}"
        snapshot = self._output_dir / PUSHED / checkpoint.name
        shutil.rmtree(snapshot, ignore_errors=True)
        shutil.copytree(checkpoint, snapshot, copy_function=_link)
        (snapshot / "README.md").write_text(self._card(step), "utf-8", "backslashreplace")
        return snapshot

    def _push_all(self) -> None:
        while (snapshot := self._waiting.get()) is not None:
            problem = self._push(snapshot)
            shutil.rmtree(snapshot, ignore_errors=True)
            with suppress(OSError):
                snapshot.parent.rmdir()
            with self._state:
                self._num_waiting -= 1
            if problem:
                logger.warning("%s was not pushed: %s. The run goes on", snapshot.name, problem)

    def _push(self, snapshot: Path) -> str:
        """Pushes a checkpoint; returns what was wrong, if anything."""
        command = [sys.executable, "-m", "lopt_pp.cli", "push", str(snapshot), *self.repository.flags.split()]
        command += ["--hub_strategy", self._strategy, *self._options]
        command += ["--commit_message", f"Training in progress, step {step_of(snapshot)}"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if self.repository.token is not None:
            environment["HF_TOKEN"] = self.repository.token
        with self._state:
            if self._is_over:
                return ""
            self._child = child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, child.pid, 10)
        said, _ = child.communicate()
        with self._state:
            self._child = None
        if child.returncode == 0 or self._is_over:
            return ""
        last = said.strip().rpartition("\n")[2].removeprefix("lopt-pp: error: ")
        return last or f"lopt-pp push has ended with status {child.returncode}"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # Of a file system without such links.
        shutil.copyfile(source, target)

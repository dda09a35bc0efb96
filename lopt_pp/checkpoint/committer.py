"""Makes complete checkpoints of the parts that the stages have written, and removes those that are too many."""

import json
import logging
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import Store

from lopt_pp.checkpoint.lock import LockLostError
from lopt_pp.checkpoint.manifest import read_manifest, write_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints, remove_checkpoint
from lopt_pp.checkpoint.writer import copied_key
from lopt_pp.distributed.shutdown import RunLength
from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.partition import BlockSpec
from lopt_pp.util.files import UNFINISHED, replace_directory
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)


class Committer:
    """Makes complete checkpoints of parts, in a thread of rank 0.

    Attributes:
        committed: the step of the newest checkpoint that was made; None before the first.

    Args:
        output_dir: of the run.
        store: a connection to the run's store for the thread.
        specs: of the stages.
        run_id: of the run, whose checkpoints the limit counts.
        may_publish: raises `LockLostError` where another run has the output directory.
        run: what the run's result depends on, by name; plain data.
        describe: puts the model's config and tokenizer into a directory.
        limit: number of this run's checkpoints to keep; None is all. Those of others are never removed.
        length: of the run.
        metrics: of the model after a step, on held-out rows, by name; nothing where it is not measured. May wait.
        best: the checkpoint to keep whatever the limit; None where there is none.
        on_commit: called with the step of each checkpoint that was made, in the thread.
        is_best: whether a model that has been measured so is better than those of all checkpoints.
    """

    def __init__(
        self,
        output_dir: Path,
        store: Store,
        specs: Sequence[BlockSpec],
        run_id: str,
        may_publish: Callable[[], None],
        run: Mapping[str, Any],
        describe: Callable[[Path], None],
        limit: int | None,
        length: RunLength,
        metrics: Callable[[int], Mapping[str, float]] = lambda step: {},
        best: Callable[[], Path | None] = lambda: None,
        on_commit: Callable[[int], None] = lambda step: None,
        is_best: Callable[[Mapping[str, float]], bool] = lambda metrics: True,
    ) -> None:
        self._output_dir = output_dir
        self._store = store
        self._specs = specs
        self._run_id = run_id
        self._may_publish = may_publish
        self._run = run
        self._describe = describe
        self._limit = limit
        self._length = length
        self._metrics = metrics
        self._best = best
        self._on_commit = on_commit
        self._is_best = is_best
        self._if_best: set[int] = set()
        """The steps that are expected, and whose checkpoints are made only of the best model so far."""
        self._held: tuple[int, Sequence[Mapping[str, Any]]] | None = None
        """The newest of these that was not the best, with its parts: it stays until the next, in case it is the last
        of a run that is stopped."""
        self.committed: int | None = None
        self._due: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending: list[int] = []
        """The steps whose checkpoints are expected and lack a part yet."""
        self._missing = 0
        """The stage whose part of the first of them is waited for."""
        self._expected_at = 0.0
        self._changed = threading.Condition()
        self._newest: float | None = None
        """When the newest checkpoint of the run was committed; None before it was looked for."""

    def expect(self, step: int, if_best: bool = False) -> None:
        """Has a checkpoint made of the parts that all stages write, or have written, after `step` steps.

        Args:
            step: of the run.
            if_best: whether only where its model is the best so far. The same step may be expected without it later.
        """
        with self._changed:
            if if_best:
                self._if_best.add(step)
            self._pending.append(step)
            self._expected_at = time.monotonic()
        self._due.put(step)
        if self._thread is None:
            self._thread = in_background(self._commit_all)

    def await_parts(self, patience: float | None, store: Store) -> str:
        """Waits until the parts of all checkpoints that are expected so far are written.

        Where a stage has not come to the first of them yet, no disk is slow, and nothing is waited for.

        Args:
            patience: seconds since the last of them was expected, after which to give up; None for as long as it takes.
            store: a connection to the run's store, of this thread.

        Returns:
            Whose part is missing then, in words; empty where none is, or its stage has not come so far.
        """

        def settled() -> bool:
            if not self._pending:
                return True
            return patience is not None and not store.check([copied_key(self._pending[0], self._missing)])

        with self._changed:
            left = None if patience is None else self._expected_at + patience - time.monotonic()
            if self._changed.wait_for(settled, left):
                return ""
            return f"stage {self._missing} is still writing its part of that of step {self._pending[0]}"

    def join(self) -> None:
        """Waits for all checkpoints that are expected so far."""
        if self._thread is not None:
            self._due.put(None)
            self._thread.join()
            self._thread = None
            self._drop()

    def _commit_all(self) -> None:
        while (step := self._due.get()) is not None:
            parts = self._take_parts(step)
            if step in self._if_best:
                self._if_best.remove(step)
                self._drop()
                if not self._is_best(self._metrics(step)):
                    self._held = step, parts
                    continue
            elif step == self.committed:  # It was the best, and is the last of a run that is stopped.
                continue
            errors = [part["error"] for part in parts if "error" in part]
            unfinished = self._output_dir / f"checkpoint-{step}{UNFINISHED}"
            try:
                if errors:
                    raise OSError("; ".join(errors))
                self._commit(unfinished, step, parts)
                self.committed = step
                self._on_commit(step)
            except LockLostError:  # The training ends of it; what is there is another run's.
                with self._changed:
                    self._pending.clear()
                    self._changed.notify_all()
                return
            except Exception as error:  # Tokenizers raise bare ones where they cannot write.
                shutil.rmtree(unfinished, ignore_errors=True)
                logger.warning(
                    "no checkpoint at step %d: %s. Earlier ones are as they were%s",
                    step,
                    first_line(error),
                    "" if self._length.is_last(step) else "; the next is tried in time",
                )

    def _drop(self) -> None:
        """Removes what is held."""
        if self._held is not None:
            shutil.rmtree(self._output_dir / f"checkpoint-{self._held[0]}{UNFINISHED}", ignore_errors=True)
            self._held = None

    def _take_parts(self, step: int) -> Sequence[Mapping[str, Any]]:
        """What the writers say of the parts of a checkpoint, once all of them do."""
        parts = []
        for spec in self._specs:
            with self._changed:
                self._missing = spec.stage
                self._changed.notify_all()
            parts.append(json.loads(self._store.get(f"part/{step}/{spec.stage}")))
        with self._changed:
            self._pending.remove(step)
            self._changed.notify_all()
        return parts

    def _commit(self, unfinished: Path, step: int, parts: Sequence[Mapping[str, Any]]) -> None:
        self._describe(unfinished)
        content = {
            "step": step,
            "edges": [spec.stop for spec in self._specs],
            "run": self._run,
            "parts": parts,
            "metrics": self._metrics(step),
        }
        complete = self._output_dir / f"checkpoint-{step}"
        # One may be there of a run that went on from before it; it is not whole, or it would have gone on from it.
        if complete.exists() and _run_id_of(complete) not in (self._run_id, None):
            raise LoptError(f"{complete} is of another run")
        if self._newest is None:
            self._newest = max((moment for moment, _ in self._own()), default=0.0)
        self._newest = max(time.time(), self._newest + 1e-3)  # The last, even after a clock was set back.
        content |= {"run_id": self._run_id, "committed": self._newest}
        write_manifest(unfinished, content)
        self._may_publish()
        replace_directory(unfinished, complete)
        logger.info("checkpoint at step %d: %s", step, complete)
        for old in self._superfluous() if self._limit is not None else ():
            with suppress(OSError):
                remove_checkpoint(old)

    def _own(self) -> list[tuple[float, Path]]:
        """The complete checkpoints of this run, the newest first, each with when it was committed."""
        found = []
        for path in complete_checkpoints(self._output_dir):
            with suppress(LoptError):
                manifest = read_manifest(path)
                if manifest.run_id == self._run_id and manifest.committed is not None:
                    found.append((manifest.committed, path))
        return sorted(found, reverse=True)

    def _superfluous(self) -> list[Path]:
        """This run's checkpoints that the limit has no place for; the newest and the best one always have one."""
        assert self._limit is not None
        newest, *older = (path for _, path in self._own())
        best = self._best() or newest
        ranked = list(dict.fromkeys([newest, best, *older]))
        return ranked[max(self._limit, len({newest, best})) :]


def _run_id_of(checkpoint: Path) -> str | None:
    """Which run a checkpoint is of; None where it does not say so."""
    with suppress(LoptError):
        return read_manifest(checkpoint).run_id
    return None

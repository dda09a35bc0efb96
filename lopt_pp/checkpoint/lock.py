"""The lock of an output directory: one run at a time writes there.

It is a file in the directory, `.lock-N`, made by exclusive creation, which network file systems have as well; the
highest N holds. Whoever takes the lock from a dead run makes `.lock-(N+1)` and then removes `.lock-N`, so of several
who try it one succeeds. The file says which process holds it; its time of change is set every few seconds, by the clock
of the file server. That the process of a dead run is gone is seen at once on its machine, or that torchrun or Slurm has
started the run again. Otherwise the time of change is watched: if it stays the same for a minute, the run is dead. No
clocks of two machines are compared.
"""

import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lopt_pp.errors import LoptError
from lopt_pp.util.process import Process, own_process

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""Between two changes of the file's time."""

LEASE_SECONDS = 60
"""Without a change of the file's time, after which a run is taken for dead."""

_KILLED_SECONDS = 1
"""That the kernel has to end a process that was killed just now."""

_ENDING_SECONDS = 15
"""That a process has to end in which the kernel has begun to end, or whose launcher is gone; of the latter many go on,
such as those that were started by a shell."""

_NAME = re.compile(r"\.lock-(\d+)")


class LockLostError(LoptError):
    """Another run has taken the output directory."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        process: that has made it.
        launch: of `lopt_pp.distributed.world.World`.
        restart: likewise.
        job: the Slurm job, with its cluster; empty outside of Slurm.
        job_restart: how often Slurm has put the job back into the queue.
        since: when it was made, for people.
        token: no other has it.
    """

    process: Process
    launch: str
    restart: int
    job: str
    job_restart: int
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.process.host}, since {self.since}"

    def follows(self, other: "Holder") -> bool:
        """Whether this is a later start of the other's run, which is over then."""
        if self.launch == other.launch and self.restart > other.restart:
            return True
        return self.job != "" and self.job == other.job and self.job_restart > other.job_restart


def this_holder(launch: str, restart: int) -> Holder:
    """This process, as who holds a lock."""
    number, cluster = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_CLUSTER_NAME", "")
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    job = f"{cluster}/{number}" if number else ""
    return Holder(own_process(), launch, restart, job, int(count) if count.isdecimal() else 0)


class OutputLock:
    """The lock of an output directory, as the process has it that holds it.

    Args:
        directory: the output directory.
        number: of the lock's file.
        holder: this process.
    """

    def __init__(self, directory: Path, number: int, holder: Holder) -> None:
        self._directory, self._path, self._holder = directory, directory / f".lock-{number}", holder
        self._is_lost = False
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether it was seen that another run has the lock; looks at no file."""
        return self._is_lost

    def check(self) -> None:
        """Sees, before something is moved to its place in the directory, that this run still has it.

        Raises:
            LockLostError: another run has it.
        """
        with self._looking:
            self._is_lost = self._is_lost or not self._still_holds()
        if self._is_lost:
            raise LockLostError(
                f"--output_dir {self._directory} was taken by another run while this one did not answer; this one "
                f"stops, and leaves what is there as it is"
            )

    def release(self) -> None:
        """Lets the lock go; may be called again, and from any thread."""
        self._ended.set()
        with self._looking, suppress(OSError):
            if _read(self._path) == self._holder:
                self._path.unlink()

    def _still_holds(self) -> bool:
        try:
            newest = max(_numbers(self._directory), default=None)
            if newest is None:  # The directory was emptied, or made anew.
                self._directory.mkdir(parents=True, exist_ok=True)
                return _create(self._path, self._holder)
            return self._directory / f".lock-{newest}" == self._path and _read(self._path) == self._holder
        except OSError:  # A full disk, or a server that is away: no other run is there for all that is known.
            return True

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and not self._is_lost:
            with self._looking:
                if self._ended.is_set():
                    return
                self._is_lost = not self._still_holds()
                with suppress(OSError):
                    os.utime(self._path)


def refuse_if_held(
    directory: Path, own: Holder, pause: Callable[[float], None] = time.sleep, watches: bool = True
) -> set[int]:
    """Sees that no living run has an output directory; what a dead one has left stays there.

    Args:
        directory: the output directory; may be missing.
        own: who asks.
        pause: waits for some seconds.
        watches: whether to wait, for up to a minute, where it is not certain whether a run lives; else it is taken for
            dead, and whoever takes the lock looks again.

    Returns:
        The numbers of the locks' files that dead runs have left.

    Raises:
        LoptError: a run has it (says which); or what is there cannot be read, such as another user's.
    """
    try:
        numbers = _numbers(directory)
        path = directory / f".lock-{max(numbers, default=0)}"
        is_over = not numbers or _is_over(path, own, pause, watches)
    except OSError as error:
        what = error.filename or directory
        raise LoptError(
            f"--output_dir {directory} may be in use by another run: {what} cannot be read: {error.strerror}"
        ) from error
    if not is_over:
        holder = _read(path)
        who = "" if holder is None else f" ({holder})"
        raise LoptError(
            f"--output_dir {directory} is in use by another run{who}: wait for its end, stop it, or give another "
            f"--output_dir"
        )
    return numbers


def look_at(directory: Path) -> tuple[Holder | None, int] | None:
    """Who holds the lock of an output directory (None where its file does not say it), and when that file has changed
    last, in nanoseconds since 1970; None where nobody holds it, or nothing can be seen. For those who only look on."""
    try:
        path = directory / f".lock-{max(_numbers(directory), default=0)}"
        changed = _changed(path)
    except OSError:
        return None
    return None if changed is None else (_read(path), changed)


@contextmanager
def hold(directory: Path, own: Holder, pause: Callable[[float], None] = time.sleep) -> Iterator[OutputLock]:
    """Takes the lock of an output directory, for as long as the context lasts.

    Args:
        directory: the output directory, which is there.
        own: who takes it.
        pause: waits for some seconds.

    Raises:
        LoptError: a living run has it, or the directory cannot be written.
    """
    try:
        number = _take(directory, own, pause)
    except OSError as error:
        raise LoptError(f"--output_dir {directory} cannot be written: {error.strerror}") from error
    lock = OutputLock(directory, number, own)
    try:
        yield lock
    finally:
        lock.release()


def _take(directory: Path, own: Holder, pause: Callable[[float], None]) -> int:
    while True:
        left = refuse_if_held(directory, own, pause)
        number = max(left, default=0) + 1
        path = directory / f".lock-{number}"
        if not _create(path, own):
            continue
        # Since the look another may have taken the lock, with this number or from 1 on, and let it go again.
        if _numbers(directory) <= {*left, number}:
            for older in left:
                (directory / f".lock-{older}").unlink(missing_ok=True)
            return number
        path.unlink(missing_ok=True)


def _is_over(path: Path, own: Holder, pause: Callable[[float], None], watches: bool) -> bool:
    """Whether the run that has made a lock's file is over; may watch the file where nothing else tells."""
    first = _changed(path)
    for second in range(LEASE_SECONDS):
        holder, changed = _read(path), _changed(path)
        if changed is None or (holder is not None and own.follows(holder)):
            return True
        is_alive = None if holder is None else holder.process.is_alive()
        is_unsure = holder is None or is_alive is None or holder.process.may_be_ending()
        if is_alive is False or (is_unsure and not watches):
            return True
        if holder is not None and is_alive:
            if second >= (_ENDING_SECONDS if holder.process.may_be_ending() else _KILLED_SECONDS):
                return False
        elif changed != first:
            return False
        elif second == 0:
            logger.info("waiting for up to %d s to see whether the run that has %s lives", LEASE_SECONDS, path.parent)
        pause(1.0)
    return True


def _numbers(directory: Path) -> set[int]:
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}


def _create(path: Path, holder: Holder) -> bool:
    """Makes a lock's file; whether it was not there."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(holder)) + "\n")
    except FileExistsError:
        return False
    except OSError:
        with suppress(OSError):
            path.unlink()  # On a full disk there is a file without its content.
        raise
    return True


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None where its file is gone, or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        holder = Holder(**content | {"process": Process(**content["process"])})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    process = holder.process
    numbers = holder.restart, holder.job_restart, process.pid, process.parent
    is_whole = all(type(number) is int for number in numbers) and 0 < process.pid < 2**31
    return holder if is_whole else None


def _changed(path: Path) -> int | None:
    """A file's time of change; None where it is gone. Opened, so that a network file system asks its server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None

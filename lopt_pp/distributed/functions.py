"""`lopt_pp.launch`: runs a function in several processes, from a script or a notebook.

The function and its arguments go to the processes by value, so it may be defined in a notebook's cell, and what this
process has done with a GPU does not matter. (A fork of this process, as others take for notebooks, could use no GPU
once this one has, and may hang where PyTorch has computed in several threads.)
"""

import operator
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from lopt_pp.errors import LoptError, first_line
from lopt_pp.util.console import write_errors_to

if TYPE_CHECKING:
    from lopt_pp.distributed.launch import Outcome

T = TypeVar("T")

_GIVEN, _RESULT = "given", "result"
"""Files in a folder of this user's: what the processes call, and what rank 0 has returned."""

_RAISED, _TOLD = "raised-", "told-"
"""Beginnings of the names of files with why a process has failed, by its rank: what the function has raised, and what a
run has said before it ended the process."""


class ProcessFailed(LoptError):
    """A process that `launch` has started has failed; the text is what it said, its traceback is in a note."""


def launch(function: Callable[..., T], args: Sequence[Any] = (), nproc: int | None = None, max_restarts: int = 0) -> T:
    """Runs a function in several processes of this machine, as those of a run, and waits for their end.

        def train():
            return Trainer(load_config("run.yaml")).train()

        lopt_pp.launch(train, nproc=2)

    Each process finds its place in the environment (`RANK`, `WORLD_SIZE`, ...), where `Trainer` looks for it. Ctrl-C
    goes to all of them; a run then stops in good order. With one process, and in a process that a launcher has started,
    the function is called here.

    Args:
        function: may be defined in a notebook or a script. It, its arguments and the globals that it uses are copied
            to each process; large ones, such as models, are better loaded inside.
        args: of the function.
        nproc: number of processes; None for one for each GPU, or one where there is none.
        max_restarts: how often all are started again after one has failed.

    Returns:
        What the function returned in the process of rank 0.

    Raises:
        ProcessFailed: the function has failed in some process; said once, whatever the number of processes.
        LoptError: the function cannot be sent to other processes, or this is not the main thread.
        KeyboardInterrupt: Ctrl-C has ended the processes.
    """
    if not callable(function) or isinstance(args, str) or not isinstance(args, Sequence):
        raise LoptError("launch: give a function, and its arguments as a tuple: launch(train, (1e-4,), nproc=2)")
    nproc, max_restarts = _number("nproc", nproc, 1), _number("max_restarts", max_restarts, 0) or 0
    if "RANK" in os.environ:
        return function(*args)
    if nproc is None:
        nproc = max(1, _count_gpus())
    if nproc == 1 and max_restarts == 0:
        return function(*args)
    if threading.current_thread() is not threading.main_thread():
        raise LoptError("launch: call it in the main thread, which alone hears signals")
    # Late: whoever imports lopt_pp need not wait for PyTorch.
    from lopt_pp.distributed.launch import Launchers
    from lopt_pp.distributed.launch import launch as start

    given = _packed((function, tuple(args)), f"launch: {_name_of(function)}")
    with TemporaryDirectory(prefix="lopt-pp-") as name, _own_environment(), _nameless_main():
        folder = Path(name)
        (folder / _GIVEN).write_bytes(given)
        outcome = start(f"{__name__}:call", [name], Launchers(nproc), max_restarts=max_restarts)
        if not outcome.failed and set(outcome.statuses.values()) == {0}:
            return _unpacked((folder / _RESULT).read_bytes())
        if outcome.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        if outcome.stopped_by is not None:
            raise ProcessFailed(f"launch: the processes were ended by {outcome.stopped_by.name}")
        raise _failure(folder) or ProcessFailed(outcome.silent_death() or _ended(outcome))


def call(arguments: list[str]) -> int:
    """What a process does: calls the function.

    Args:
        arguments: the folder.
    """
    folder, rank = Path(arguments[0]), os.environ["RANK"]
    raised, told = folder / f"{_RAISED}{rank}", folder / f"{_TOLD}{rank}"
    for earlier in (raised, told):  # Of an earlier start.
        earlier.unlink(missing_ok=True)
    write_errors_to(told)
    try:
        function, args = _unpacked((folder / _GIVEN).read_bytes())
        result = function(*args)
        if rank == "0":
            (folder / _RESULT).write_bytes(_packed(result, f"launch: what {_name_of(function)} returns"))
    except Exception as error:  # It is raised again where `launch` was called.
        text = str(error) if isinstance(error, LoptError) else f"{type(error).__name__}: {error}"
        unfinished = folder / f"unfinished-{rank}"
        unfinished.write_text(f"{text}\0{traceback.format_exc()}", encoding="utf-8", errors="backslashreplace")
        unfinished.rename(raised)
        return 1
    return 0


def _failure(folder: Path) -> ProcessFailed | None:
    """What the process says that has failed first."""
    files = [path for path in folder.iterdir() if path.name.startswith((_RAISED, _TOLD))]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        text, _, trace = path.read_text(encoding="utf-8").partition("\0")
        if not text.strip():
            continue
        error = ProcessFailed(f"rank {path.name.rpartition('-')[2]}: {text.strip()}")
        if trace:
            error.add_note(trace)
        return error
    return None


def _ended(outcome: "Outcome") -> str:
    """Which process has ended without a word, as by `sys.exit`."""
    ended = [(rank, status) for rank, status in (outcome.failed or outcome.statuses).items() if status]
    if not ended:
        return f"a process has ended with {outcome.status}"
    rank, status = ended[0]
    return f"rank {rank}: the function has ended its process with exit status {status}"


def _packed(value: Any, what: str) -> bytes:
    # Late, as above.
    import cloudpickle

    try:
        return cloudpickle.dumps(value)
    except Exception as error:  # Whatever an object of somebody's raises.
        raise LoptError(
            f"{what} cannot be sent to another process: {type(error).__name__}: {first_line(error)}; make inside the "
            f"function what it uses"
        ) from error


def _unpacked(content: bytes) -> Any:
    import cloudpickle

    return cloudpickle.loads(content)


def _number(name: str, value: object, least: int) -> int | None:
    """A number that `launch` is given; None stays so.

    Raises:
        LoptError: it is something else, or too small.
    """
    if value is None:
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise LoptError(f"launch: {name} is {value!r}; give a whole number") from error
    if number < least:
        raise LoptError(f"launch: {name} {number}: at least {least}")
    return number


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "the function")


def _count_gpus() -> int:
    from lopt_pp.distributed.process_count import gpus_seen

    return gpus_seen()


@contextmanager
def _own_environment() -> Iterator[None]:
    """Leaves the environment as it was: what the launcher sets is for its processes."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Keeps the processes from running the script that calls `launch` once more: they have the function by value."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before

"""The process that those of a run are forked from, which has imported the trainer once for all of them.

It can be started before this process has imported PyTorch itself, so that both import at the same time.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

TRAINER = ("lopt_pp.train", "lopt_pp.training.trainer")
"""What a process imports that trains. (The first imports the second once its flags are read.)"""


def prepare_server(processes: int, preload: Sequence[str] = TRAINER) -> None:
    """Says what the server imports and has in its environment, if it is not there yet.

    Args:
        processes: of this machine, which share its cores.
        preload: modules.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Importing a library may ask whether there is a GPU. Asked through the driver's API, no process that is forked
    # afterwards could use one; this way it is asked through NVML.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # What PyTorch's sockets warn of, with the frames of its C++, when a process has gone: the run says it in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))


_OF_TERMINAL = {signal.SIGINT, signal.SIGHUP}
"""What all processes get that a terminal runs, at Ctrl-C and when it is closed. The launcher hands them on."""


_server = 0
"""Pid of the server that `start_server` has started; 0 where it has not."""


def start_server(processes: int, preload: Sequence[str] = TRAINER) -> None:
    """Has the server import the trainer while this process does something else.

    The server and what keeps count of its semaphores do not hear the terminal's signals, from their first moment on:
    they would print a traceback at Ctrl-C, and die when the terminal is closed, and the run with them.

    Args:
        processes: see `prepare_server`.
        preload: likewise.
    """
    global _server
    prepare_server(processes, preload)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINAL)
    try:
        # By itself first, since it lets SIGINT through again.
        with _without_a_word():
            resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINAL)
        others = _children(os.getpid())
        forkserver.ensure_running()
        _server = next(iter(_children(os.getpid()) - others), _server)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_server() -> None:
    """Ends the server that `start_server` has started, and the processes that it has just forked.

    For a launcher that ends before they have come up. The server would fork them all the same, seconds later, and each
    would print a traceback, since the semaphore that it shares with the launcher is gone.
    """
    if _server not in _children(os.getpid()):
        return
    os.kill(_server, signal.SIGSTOP)  # Now it forks no more.
    for process in (*_children(_server), _server):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _children(process: int) -> set[int]:
    """The processes that one has started, as the kernel knows them; none where it does not say."""
    found: set[int] = set()
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # A thread that has ended.
            found |= set(map(int, path.read_text(encoding="ascii").split()))
    return found


@contextmanager
def _without_a_word() -> Iterator[None]:
    """Has Python's resource tracker remove what a killed launcher leaves behind, and print no warning of it."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def leave_server() -> None:
    """Makes a process that is forked from the server hear a terminal again, and stop in good order after its death.

    PyTorch has it get SIGINT then, which the kernel sends once for each thread of the server: the second would end it
    at once.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_TERMINAL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1

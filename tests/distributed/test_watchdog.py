"""What the watchdog says of a neighbour whose connection fails, and of a message that fails elsewhere in the run.

Processes that really die are in tests/runs/test_failures.py.
"""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import nccl_texts
import pytest
import torch
import torch.distributed as dist

from lopt_pp.config.topology import Topology
from lopt_pp.distributed import watchdog
from lopt_pp.distributed.watchdog import Watchdog
from lopt_pp.distributed.world import World

NO_ROUTE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:2921: No route to host"


class _Goodbye:
    """A neighbour's, whose connection fails when `breaks` says so."""

    def __init__(self, text: str, breaks: threading.Event) -> None:
        self._text, self._breaks = text, breaks

    def wait(self, timeout: timedelta) -> bool:
        self._breaks.wait()
        raise RuntimeError(self._text)


def ended(patch: pytest.MonkeyPatch, goodbye: str, run: Callable[[threading.Event], object]) -> None:
    """Watches over a run in a process of two, until something ends the process; the other says `goodbye`."""
    is_over, breaks = threading.Event(), threading.Event()

    def leave(status: int) -> None:
        is_over.set()
        threading.Event().wait()  # Whoever ends a process does not come back.

    patch.setattr(watchdog, "os", type("os", (), {"_exit": staticmethod(leave)}))
    patch.setattr(dist, "irecv", lambda *_, **__: _Goodbye(goodbye, breaks))
    store = dist.HashStore()
    world = World(1, 2, torch.device("cpu"), "gloo", store, store)
    patch.setattr(World, "connection", lambda self, *_: dist.HashStore())
    patch.setattr(World, "await_failure", lambda self, store: threading.Event().wait())

    def watch() -> None:
        with Watchdog(world, Topology(2, 2)):
            run(breaks)

    # Not the main thread, which takes signals.
    threading.Thread(target=watch, daemon=True).start()
    assert is_over.wait(60)


def breaks(event: threading.Event) -> Any:
    event.set()
    return threading.Event().wait()


@pytest.mark.parametrize(
    ("text", "said"),
    {
        nccl_texts.GLOO_CLOSED: "stage 0 (rank 0) has died or lost its network (Connection closed by peer "
        "[127.0.0.1]:12175); stage 1 (rank 1) stops",
        nccl_texts.GLOO_RESET: "stage 0 (rank 0) has died or lost its network (Read error [10.0.0.2]:2921: Connection "
        "reset by peer); stage 1 (rank 1) stops",
        NO_ROUTE: "stage 1 (rank 1) lost its connection to stage 0 (rank 0): Read error [10.0.0.2]:2921: No route to "
        "host",
    }.items(),
)
def test_a_connection_that_fails_is_told_with_its_cause(
    text: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended(monkeypatch, text, breaks)
    assert capfd.readouterr().err == f"lopt-pp: error: {said}\n"


def test_a_collective_that_fails_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a reduction between replicas, or a message of torch's own pipeline."""

    def run(event: threading.Event) -> None:
        raise dist.DistBackendError(nccl_texts.DUPLICATE_GPU)

    ended(monkeypatch, "", run)
    cause = "NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.29.3: Duplicate GPU "
    said = f"a message to or from another process failed: {cause}detected : rank 1 and rank 0 both on CUDA device 4a000"
    assert capfd.readouterr().err == f"lopt-pp: error: stage 1 (rank 1): {said}\n"


def test_who_has_died_is_told_rather_than_that_a_collective_failed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A collective does not know which process it failed for; whoever watches the connection does, a moment later."""

    def run(event: threading.Event) -> None:
        threading.Timer(0.2, event.set).start()
        raise RuntimeError(nccl_texts.GLOO_RESET)

    ended(monkeypatch, nccl_texts.GLOO_CLOSED, run)
    assert capfd.readouterr().err.startswith("lopt-pp: error: stage 0 (rank 0) has died or lost its network (")


def test_an_error_of_the_gpu_is_told_in_one_line_below_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(event: threading.Event) -> None:
        raise RuntimeError(nccl_texts.ILLEGAL_ACCESS)

    ended(monkeypatch, "", run)
    text = capfd.readouterr().err
    assert "Traceback" in text
    assert text.endswith(
        "lopt-pp: error: stage 1 (rank 1): RuntimeError: CUDA error: an illegal memory access was encountered\n"
    )

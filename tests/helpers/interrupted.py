"""The trainer, stopped in the middle of an evaluation: rank 0 sends itself a signal, and waits till it is heard."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence

import lopt_pp.train
from lopt_pp.data import Microbatch
from lopt_pp.distributed.shutdown import StopCoordinator
from lopt_pp.training.held_out import Evaluation

PASS, MICROBATCH = 2, 3
"""Which evaluation, from 1, and before which of its microbatches, from 0."""

_microbatches, _await_request = Evaluation.microbatches, StopCoordinator._await_requests
_decided = threading.Event()
_passes = 0


def _interrupt(self: Evaluation) -> Iterator[Microbatch]:
    global _passes
    _passes += 1
    for number, batch in enumerate(_microbatches(self)):
        if (_passes, number) == (PASS, MICROBATCH):
            os.kill(os.getpid(), signal.SIGTERM)
            assert _decided.wait(60)
        yield batch


def _decide(self: StopCoordinator) -> None:
    _await_request(self)
    _decided.set()


def main(arguments: Sequence[str]) -> int:
    if os.environ["RANK"] == "0":
        Evaluation.microbatches = _interrupt  # type: ignore[method-assign]
        StopCoordinator._await_requests = _decide  # type: ignore[method-assign]
    return lopt_pp.train.main(arguments)

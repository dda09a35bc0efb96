"""What makes `torchrun --rdzv-backend lopt-pp` known."""

import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any


def torchrun_backend() -> Callable[[Any], Any]:
    """What makes `torchrun --rdzv-backend lopt-pp` known: an entry point, see pyproject.toml and `rendezvous`."""

    def create(parameters: Any) -> Any:
        # Late: every torchrun of this environment asks for the entry point, and most want another backend.
        from lopt_pp.distributed.rendezvous import create_rendezvous

        sys.excepthook = _say_end
        return create_rendezvous(parameters)

    return create


def _say_end(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Says in a line what has ended torchrun, which would print a traceback below the run's own last words."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, SignalException):
        print(f"torchrun: ended by {signal.Signals(error.sigval).name}", file=sys.stderr)
    elif isinstance(error, ChildFailedError):
        for rank, failure in error.failures.items():
            status = failure.exitcode
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"has ended with status {status}"
            print(f"torchrun: the process of rank {rank} {how}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, where)

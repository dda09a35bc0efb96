"""What makes `torchrun --rdzv-backend lopt-pp` known."""

from collections.abc import Callable
from typing import Any


def torchrun_backend() -> Callable[[Any], Any]:
    """What makes `torchrun --rdzv-backend lopt-pp` known: an entry point, see pyproject.toml and `rendezvous`."""

    def create(parameters: Any) -> Any:
        # Late: every torchrun of this environment asks for the entry point, and most want another backend.
        from lopt_pp.distributed.rendezvous import create_rendezvous

        return create_rendezvous(parameters)

    return create

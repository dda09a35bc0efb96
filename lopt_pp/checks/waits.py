"""Whether the host waits for its GPU within a step: then the GPU has nothing to do until the host has gone on."""

import traceback
import warnings
from collections import Counter
from typing import Any

import torch

from lopt_pp.checks.result import CheckFailed, Figures, NotHere
from lopt_pp.checks.session import Session
from lopt_pp.checks.training import flags_of

_WARNING = "called a synchronizing CUDA operation"
"""What PyTorch says of each wait in its sync debug mode."""


def waits(session: Session) -> Figures:
    """No wait from a step's first microbatch to its optimizer step, but in the first steps, which prepare things."""
    if session.backend != "nccl":
        raise NotHere("there is no GPU that the host could wait for")
    out = session.folder / "waits" / "out"
    flags = flags_of(session, out, session.topology, "--gradient_accumulation_steps", "4")
    ran = session.run("waits", flags, entry="train_counting_waits").succeeded()
    microbatches = sum(found["microbatches"] for found in ran.results)
    places: Counter[str] = Counter()
    for found in ran.results:
        places.update(found["places"])
    if places:
        place, number = places.most_common(1)[0]
        raise CheckFailed(
            f"the host waits for the GPU {places.total() / microbatches:.2g} times a microbatch, mostly at {place} "
            f"({number} times in {microbatches} microbatches): training is right, and slower than need be; report it"
        )
    return {"waits in": f"{microbatches} microbatches: none"}


class WaitCounter:
    """Counts what waits in the microbatches of a process.

    Attributes:
        microbatches: that were looked at.
        places: in the package's code, with the number of waits.
    """

    def __init__(self) -> None:
        self.microbatches = 0
        self.places: Counter[str] = Counter()

    def look_at(self, microbatch: Any, *arguments: Any, **options: Any) -> Any:
        """Runs a function that is a stage's part of a microbatch."""

        def note(message: Warning | str, *_: Any, **__: Any) -> None:
            if _WARNING in str(message):
                own = [frame for frame in traceback.extract_stack() if "/lopt_pp/" in frame.filename]
                # The two innermost are this function and its caller's.
                inner = [frame for frame in own if not frame.filename.endswith("checks/waits.py")]
                place = inner[-1] if inner else own[-1]
                self.places[f"{place.filename.rpartition('/lopt_pp/')[2]}:{place.lineno}"] += 1

        self.microbatches += 1
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return microbatch(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode(before)

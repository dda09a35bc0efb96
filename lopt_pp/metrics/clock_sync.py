"""How far a process's clock is from rank 0's, so that what they time can be put on one clock.

Each process asks rank 0 for its time some times over, through the run's store, and takes the answer that came soonest
(Cristian's algorithm): rank 0 read its clock at some moment between question and answer, so half of the time between
them bounds the error. Processes of one machine read the same clock, and need no answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lopt_pp.distributed.world import World

_QUESTIONS = 5


@dataclass(frozen=True)
class Offset:
    """What to add to this process's `time.perf_counter` to get rank 0's.

    Attributes:
        seconds: to add.
        error: the most that it may be wrong by, in seconds.
    """

    seconds: float = 0.0
    error: float = 0.0


def estimate(answers: Sequence[tuple[float, float, float]], same_machine: bool) -> Offset:
    """The offset that (asked, rank 0's time, answered) tell.

    Args:
        answers: at least one; the first and the last time by this process's clock.
        same_machine: whether the two processes may read the same clock. It is taken to be the same, then, unless the
            answers prove the contrary (as in containers with clocks of their own).
    """
    asked, told, answered = min(answers, key=lambda answer: answer[2] - answer[0])
    seconds, error = told - (asked + answered) / 2, (answered - asked) / 2
    if same_machine and abs(seconds) <= error:
        return Offset()
    return Offset(seconds, error)


def measure_offset(world: World) -> Offset:
    """This process's offset from rank 0. All must call this, before the first step."""
    machine = _machine()
    if world.rank == 0:
        world.store.set("clock/machine", machine)
        for rank in range(1, world.size):
            for question in range(_QUESTIONS):
                world.store.wait([f"clock/{rank}/{question}"])
                world.store.set(f"clock/{rank}/{question}/answer", repr(time.perf_counter()))
        return Offset()
    answers = []
    for question in range(_QUESTIONS):
        asked = time.perf_counter()
        world.store.set(f"clock/{world.rank}/{question}", "")
        world.store.wait([f"clock/{world.rank}/{question}/answer"])
        answered = time.perf_counter()
        told = float(world.store.get(f"clock/{world.rank}/{question}/answer"))
        answers.append((asked, told, answered))
    return estimate(answers, same_machine=machine != "" and machine == world.store.get("clock/machine").decode())


def _machine() -> str:
    """What a running kernel is known by; empty where there is no such thing."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""

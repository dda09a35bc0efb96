"""What a run is doing, or how it has ended, by the files in its output directory."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lopt_pp.checkpoint.lock import LEASE_SECONDS, Holder, look_at
from lopt_pp.metrics.state import STATE_FILE, RunState, read_state
from lopt_pp.report.run_data import RunData
from lopt_pp.util.files import UNFINISHED

_SAVING = re.compile(rf"checkpoint-(\d+){re.escape(UNFINISHED)}")

_RECENT = 50
"""Steps by whose times the time that is left is estimated."""

Name = Literal[
    "waiting", "starting", "training", "evaluating", "saving", "finished", "stopped", "failed", "dead", "ended"
]


@dataclass(frozen=True)
class State:
    """What a page says of the state of a run.

    Attributes:
        name: one word.
        text: what else there is to say.
    """

    name: Name
    text: str

    @property
    def goes_on(self) -> bool:
        """Whether the run lives, as far as is known."""
        return self.name in ("starting", "training", "evaluating", "saving")


class StateReader:
    """Tells the state of a run, again and again: whether a run on another machine lives, only time can show.

    Args:
        directory: the output directory; may be missing.
        clock: seconds that have passed.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory, self._clock = directory, clock
        self._seen: tuple[int, float] | None = None
        """The last change of the lock, and when it was seen first."""

    def read(self, run: RunData | None) -> State | None:
        """The state as it is now; None of a run that has left no word of it.

        Args:
            run: what else is known; None before the first step.
        """
        # In this order, since a run writes how it has ended before it lets its lock go.
        lock, said = look_at(self._directory), read_state(self._directory)
        if lock is None:
            self._seen = None
            return self._without_lock(run, said)
        holder, changed = lock
        is_own = said is not None and (holder is None or holder.process == said.process)
        if said is not None and is_own and said.is_end:
            return _ended(said)
        if (last_sign := self._last_sign(holder, changed)) is not None:
            who = "" if holder is None else f"process {holder.process.pid} on {holder.process.host} is gone or hangs: "
            after = "" if run is None else f" It has made {run.steps} steps."
            return State("dead", f"{who}no sign of the run since {_moment(last_sign)}.{after}")
        if said is None or not is_own:
            return State("starting", "loading the model and the rows")
        return State(said.state, self._doing(run, said))

    def _without_lock(self, run: RunData | None, said: RunState | None) -> State | None:
        if said is not None and said.is_end:
            return _ended(said)
        if said is not None:
            return State(
                "ended",
                f"after {_moment(said.since)}; {STATE_FILE} has no reason, so see what the run has printed",
            )
        if run is not None:
            return None
        if not os.path.isdir(self._directory):
            return State("waiting", f"{self._directory} is not there yet; this page begins when a run does")
        return State("waiting", f"no run has begun in {self._directory}; this page begins when one does")

    def _last_sign(self, holder: Holder | None, changed: int) -> float | None:
        """When a run that is dead gave its last sign, in seconds since 1970; None where it lives."""
        if self._seen is None or self._seen[0] != changed:
            self._seen = changed, self._clock()
        is_alive = None if holder is None else holder.process.is_alive()
        is_silent = self._clock() - self._seen[1] > LEASE_SECONDS
        return changed / 1e9 if is_alive is False or (is_alive is None and is_silent) else None

    def _doing(self, run: RunData | None, said: RunState) -> str:
        if said.state == "saving":
            return f"the model or a checkpoint of step {said.step}, since {_moment(said.since)}"
        parts = [f"since {_moment(said.since)}"] if said.state == "evaluating" else []
        if run is None and said.state == "training":
            parts.append("the first step")
        if run is not None:
            planned = run.about.get("num_steps")
            parts.append(f"step {run.steps} of {planned}" if planned else f"step {run.steps}")
            if planned and (left := planned - run.steps) > 0:
                recent = run.stages[-1][-_RECENT:]
                seconds = left * sum(record["step_seconds"] for record in recent) / len(recent)
                parts.append(f"about {duration(seconds)} left")
        parts += [f"saving checkpoint-{step}" for step in self._being_saved()]
        return ", ".join(parts)

    def _being_saved(self) -> list[int]:
        found = (_SAVING.fullmatch(path.name) for path in self._directory.glob(f"checkpoint-*{UNFINISHED}"))
        return sorted(int(match[1]) for match in found if match)


def _ended(said: RunState) -> State:
    when = f"at {_moment(said.since)}, after step {said.step}"
    if said.state == "stopped":
        return State("stopped", f"by {said.reason} {when}")
    return State(said.state, f"{when}: {said.reason}" if said.reason else when)


def _moment(seconds: float) -> str:
    """A moment, given in seconds since 1970, in the reader's time zone; with its day unless that is today."""
    moment, today = time.localtime(seconds), time.localtime()
    return time.strftime("%H:%M:%S" if moment[:3] == today[:3] else "%Y-%m-%d %H:%M:%S", moment)


def duration(seconds: float) -> str:
    """A time in words, rounded to what matters."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"

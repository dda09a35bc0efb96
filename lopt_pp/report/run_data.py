"""Reads what a run has left in its output directory."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lopt_pp.errors import LoptError, first_line
from lopt_pp.metrics.records import COMPUTE_PHASES, FILE, PHASES, is_measured, time_shares

_WARM_UP = 0.1
"""The share of a run's steps, from the first one on, that its mean times leave out: pipeline and caches fill."""

_HELD_OUT_LOSS = re.compile(r"eval_(.+_)?loss")
"""Of the last stage; transformers puts the name of a set of held-out rows into it, where there are several."""

Curve = tuple[list[float], list[float]]
"""Steps, and a value at each."""


@dataclass(frozen=True)
class StageTimes:
    """A stage's mean step, without the first ones.

    Attributes:
        stage: its number.
        seconds: by phase, and `other`.
        wall: seconds of the whole step.
    """

    stage: int
    seconds: dict[str, float]
    wall: float

    @property
    def computing(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds[phase] for phase in COMPUTE_PHASES)

    def share(self, phase: str) -> float:
        """Of the wall time."""
        return self.seconds[phase] / self.wall

    @property
    def computing_share(self) -> float:
        return self.computing / self.wall


@dataclass(frozen=True)
class RunData:
    """What is known of a run.

    Attributes:
        directory: its output directory.
        stages: the records of each stage, in order.
        start: those of step 0, an evaluation before the first step, of each stage; empty where there was none.
        about: `run.json`; empty where there is none.
        trace: the events of `trace.json`; empty where there is none.
        stopped: `stopped.json`; None where the run was not stopped.
    """

    directory: Path
    stages: tuple[tuple[dict[str, Any], ...], ...]
    about: dict[str, Any]
    trace: tuple[dict[str, Any], ...]
    stopped: dict[str, Any] | None
    start: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.about.get("name") or self.directory.resolve().name

    @property
    def steps(self) -> int:
        """The last step that all stages have made."""
        return int(self.stages[-1][-1]["step"])

    @property
    def is_over(self) -> bool:
        """Whether it makes no more steps; True as well where its number of steps is not known."""
        ended = self.stopped is not None or "finished_early" in self.about
        return ended or self.steps >= self.about.get("num_steps", 0)

    @property
    def flags(self) -> dict[str, Any]:
        return self.about.get("flags", {})

    @property
    def layers(self) -> list[tuple[int, int]] | None:
        """The first layer of each stage and the one after its last; None where that is not known."""
        found = {s["stage"]: tuple(s["layers"]) for process in self._processes for s in process["stages"]}
        return [found[stage] for stage in sorted(found)] if len(found) == len(self.stages) else None

    @property
    def stages_of_processes(self) -> list[list[int]]:
        """The stages that each process of a replica holds; one each where that is not known."""
        processes = {tuple(s["stage"] for s in process["stages"]) for process in self._processes}
        return [list(stages) for stages in sorted(processes)] or [[stage] for stage in range(len(self.stages))]

    @property
    def _processes(self) -> list[dict[str, Any]]:
        return self.about.get("processes", [])

    def curve(self, stage: int, name: str) -> Curve:
        """A stage's values of that name, at the steps that have one; at step 0, those of an evaluation."""
        records = self.stages[stage]
        if is_measured(name):
            records = (*self.start[stage : stage + 1], *records)
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        return [step for step, _ in points], [value for _, value in points]

    def local_loss(self, stage: int) -> str | None:
        """The name of an earlier stage's own loss; None where it has none."""
        # Of all records: a step without a target token has none.
        names = (name for name in self.names(stage) if name != "router_aux_loss")
        return next((name for name in names if name.endswith("_loss") and not name.startswith("eval")), None)

    def names(self, stage: int) -> list[str]:
        """Of all values in a stage's records, in the order in which they come first."""
        return self._names[stage]

    @cached_property
    def _names(self) -> list[list[str]]:
        records = [(*self.start[stage : stage + 1], *own) for stage, own in enumerate(self.stages)]
        return [list(dict.fromkeys(name for record in own for name in record)) for own in records]

    @cached_property
    def held_out(self) -> dict[str, str]:
        """The names of the task loss on held-out rows, by what the set of rows is called: empty where there is one."""
        names = [name for name in self.names(len(self.stages) - 1) if _HELD_OUT_LOSS.fullmatch(name)]
        return {name.removeprefix("eval_").removesuffix("loss").rstrip("_"): name for name in sorted(names)}

    def share_curve(self, stage: int, what: str) -> Curve:
        """The share of each step's wall time that a stage spent on something; see `time_shares`."""
        points = [(record["step"], time_shares(record).get(what)) for record in self.stages[stage]]
        return [step for step, value in points if value is not None], [v for _, v in points if v is not None]

    def warm(self, stage: int) -> Sequence[dict[str, Any]]:
        """A stage's records without those of the first steps."""
        records = self.stages[stage]
        return records[min(max(1, round(_WARM_UP * len(records))), len(records) - 1) :]

    def times(self, stage: int) -> StageTimes:
        """The mean step of a stage."""
        return self._times[stage]

    @cached_property
    def _times(self) -> list[StageTimes]:
        return [self._times_of(stage) for stage in range(len(self.stages))]

    def _times_of(self, stage: int) -> StageTimes:
        records = self.warm(stage)
        seconds = {
            phase: sum(record.get(f"{phase}_seconds", 0.0) for record in records) / len(records) for phase in PHASES
        }
        wall = sum(record["step_seconds"] for record in records) / len(records)
        return StageTimes(stage, seconds | {"other": max(wall - sum(seconds.values()), 0.0)}, wall)

    @property
    def tokens_per_second(self) -> float:
        """Of the run, by its last stage, without the first steps."""
        records = self.warm(len(self.stages) - 1)
        return sum(record["num_tokens"] for record in records) / sum(record["step_seconds"] for record in records)

    @property
    def seconds(self) -> float:
        """Of all steps, by the last stage's wall time."""
        return sum(record["step_seconds"] for record in self.stages[-1])


def read_run(directory: Path) -> RunData:
    """Reads a run's output directory; the run may still go on.

    Raises:
        LoptError: there are no metrics, or a file is not what it should be.
    """
    path = directory / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        lacks = "has no metrics.jsonl" if directory.is_dir() else "is not a directory"
        raise LoptError(f"{directory} {lacks}; give the --output_dir of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise LoptError(f"{path} cannot be read: {reason}; give the --output_dir of a run") from error
    records = Records()
    for number, line in enumerate(lines, 1):
        try:
            records.add(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # Half written: the run goes on, or was killed.
                break
            raise LoptError(f"{path}, line {number}: no record of a step") from error
    if not records.is_whole:
        raise LoptError(f"{path} has no step of all stages yet")
    trace = read_json(directory / "trace.json")
    return records.run(
        directory, read_json(directory / FILE), trace, stopped=read_json(directory / "stopped.json") or None
    )


class Records:
    """The records of a run, as they are read line by line."""

    def __init__(self) -> None:
        self._steps: dict[int, list[dict[str, Any]]] = {}
        self._start: dict[int, dict[str, Any]] = {}

    def add(self, line: str | bytes) -> None:
        """Takes a line of `metrics.jsonl`.

        Raises:
            ValueError, KeyError, TypeError: it is not a record of a step.
        """
        record = json.loads(line)
        _ = record["step_seconds"], record["num_tokens"]
        if record["step"] == 0:
            self._start[record["stage"]] = record
        else:
            self._steps.setdefault(record["stage"], []).append(record)

    @property
    def is_whole(self) -> bool:
        """Whether all stages have a step."""
        return bool(self._steps) and sorted(self._steps) == list(range(len(self._steps)))

    def run(
        self, directory: Path, about: dict[str, Any], trace: Mapping[str, Any], stopped: dict[str, Any] | None
    ) -> RunData:
        """What is known of the run, where `is_whole`; its other files are given."""
        return RunData(
            directory,
            tuple(tuple(self._steps[stage]) for stage in sorted(self._steps)),
            about,
            tuple(trace.get("traceEvents", ())),
            stopped,
            tuple(self._start[stage] for stage in sorted(self._start)),
        )


def read_json(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is none.

    Raises:
        LoptError: it cannot be read, or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise LoptError(f"{path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise LoptError(f"{path} is not what a run writes")
    return content

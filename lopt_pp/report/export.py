"""Reports and comparisons as JSON and CSV, for programs.

JSON has what a run has come to; CSV has the values of every step of a run, or a line for each of several runs.
"""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lopt_pp.metrics.records import PHASES
from lopt_pp.report.advice import advise
from lopt_pp.report.comparison import differing_flags, names_of
from lopt_pp.report.results import best_of, results
from lopt_pp.report.run_data import RunData
from lopt_pp.report.state import State

FORMAT = 1
"""Of the JSON; the number changes when what was there before is not there any more, or means something else."""


def report_json(run: RunData, state: State | None) -> str:
    """What there is to know of a run, but its curves."""
    said = None if state is None else asdict(state)
    advice = [asdict(one) for one in advise(run)]
    return _json({"format": FORMAT, **_about(run), "state": said, "advice": advice, "flags": run.flags})


def report_csv(run: RunData) -> str:
    """The values of every step, one line for each step and stage: those of `metrics.jsonl`."""
    records = [*run.start, *(record for step in zip(*run.stages, strict=False) for record in step)]
    names = list(dict.fromkeys(name for record in records for name in record))
    first = [name for name in ("step", "stage") if name in names]
    return _csv([*first, *(name for name in names if name not in first)], records)


def comparison_json(runs: Sequence[RunData]) -> str:
    """What there is to know of several runs, which ends best, and the flags that differ."""
    names, best = names_of(runs), best_of([results(run) for run in runs])
    flags = {
        flag: {name: run.flags.get(flag) for name, run in zip(names, runs, strict=True)}
        for flag in differing_flags(runs)
    }
    about = [_about(run) | {"name": name} for name, run in zip(names, runs, strict=True)]
    chosen = None if best is None else {"name": names[best[0]], "by": _loss_name(best[1])}
    return _json({"format": FORMAT, "runs": about, "best": chosen, "differing_flags": flags})


def comparison_csv(runs: Sequence[RunData]) -> str:
    """One line for each run: its results, and the flags that differ."""
    lines = []
    for name, run in zip(names_of(runs), runs, strict=True):
        found = asdict(results(run))
        held_out = {
            f"{_loss_name(rows)}_{key}": value
            for rows, measured in found.pop("held_out").items()
            for key, value in measured.items()
        }
        flags = {f"--{flag}": run.flags.get(flag) for flag in differing_flags(runs)}
        lines.append({"name": name, "directory": str(run.directory), **held_out, **found, **flags})
    return _csv(list(dict.fromkeys(column for line in lines for column in line)), lines)


def _loss_name(rows: str | None) -> str:
    """The name in the records of the loss on a set of held-out rows; None stands for the training rows."""
    return "loss" if rows is None else f"eval_{rows}_loss" if rows else "eval_loss"


def _about(run: RunData) -> dict[str, Any]:
    found = asdict(results(run))
    found["held_out"] = {_loss_name(rows): measured for rows, measured in found["held_out"].items()}
    layers = run.layers
    stages = [
        {
            "stage": stage,
            "layers": None if layers is None else layers[stage],
            "step_seconds": (times := run.times(stage)).wall,
            **{f"{phase}_seconds": times.seconds[phase] for phase in PHASES},
            "peak_memory_bytes": max(record.get("peak_memory_bytes", 0) for record in run.stages[stage]),
        }
        for stage in range(len(run.stages))
    ]
    about = {name: run.about.get(name) for name in ("started", "model_class", "rows", "num_steps", "versions")}
    return {"name": run.name, "directory": str(run.directory), **about, "results": found, "stages": stages}


def _json(content: object) -> str:
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    """The same with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _csv(columns: Sequence[str], lines: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()

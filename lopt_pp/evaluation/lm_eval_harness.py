"""Benchmarks, through the optional lm-evaluation-harness (`lm_eval`)."""

import contextlib
import fnmatch
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from lopt_pp.errors import LoptError, first_line
from lopt_pp.evaluation.scores import Measure, Score


@dataclass(frozen=True)
class Benchmarks:
    """What to run, and how; the flags of `lm_eval` by the same names.

    Attributes:
        tasks: names, of the task that was trained on.
        general_tasks: names, of what is to be kept.
        limit: items of each, or a share of them below 1; None is all.
        num_fewshot: examples before each item; None leaves it to the benchmark.
        batch_size: sequences at once, or `auto`.
        apply_chat_template: whether items become a user's turn.
        include_path: directory with benchmarks of one's own.
    """

    tasks: Sequence[str] = ()
    general_tasks: Sequence[str] = ()
    limit: float | None = None
    num_fewshot: int | None = None
    batch_size: str = "8"
    apply_chat_template: bool = False
    include_path: str | None = None


def check_installed() -> None:
    """Sees that there is a harness.

    Raises:
        LoptError: there is none; says how to get it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise LoptError("--tasks and --general_tasks need lm-evaluation-harness: pip install 'lm-eval[hf]>=0.4.13'")


def run_benchmarks(
    path: str, benchmarks: Benchmarks, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> dict[Measure, Score]:
    """What a model scores.

    Args:
        path: of the model, or its hub id.
        benchmarks: to run.
        device: to run them on.
        dtype: to run them in.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        LoptError: there is no such benchmark, its data cannot be had, or it fails.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    options = {"pretrained": path, "dtype": str(dtype).removeprefix("torch."), "trust_remote_code": trust_remote_code}
    limit = benchmarks.limit
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=options,
            tasks=list(dict.fromkeys([*benchmarks.tasks, *benchmarks.general_tasks])),
            num_fewshot=benchmarks.num_fewshot,
            batch_size=benchmarks.batch_size,
            device=str(device),
            limit=limit if limit is None or limit < 1 else int(limit),
            apply_chat_template=benchmarks.apply_chat_template,
            task_manager=TaskManager(include_path=benchmarks.include_path),
        )
    except Exception as error:  # Benchmarks raise whatever they like: unknown names, data that cannot be fetched.
        raise LoptError(f"lm_eval fails on {path}: {type(error).__name__}: {first_line(error)}") from error
    assert found is not None
    scores: dict[Measure, Score] = {}
    wanted: list[tuple[Literal["task", "general"], Sequence[str]]] = [
        ("task", benchmarks.tasks),
        ("general", benchmarks.general_tasks),
    ]
    for kind, names in wanted:
        for name in names:
            for benchmark in _found_as(name, found):
                scores |= _scores_of(benchmark, kind, found)
    return scores


def _found_as(name: str, found: Mapping[str, Any]) -> list[str]:
    """The benchmarks among the results that a name means: itself, or those of a group or a pattern."""
    results = found["results"]
    if name in results and any(isinstance(value, float) for value in results[name].values()):
        return [name]
    return [*found.get("group_subtasks", {}).get(name, ()), *(key for key in results if fnmatch.fnmatch(key, name))]


def _scores_of(benchmark: str, kind: Literal["task", "general"], found: Mapping[str, Any]) -> dict[Measure, Score]:
    """All numbers of a benchmark; the harness names them `metric,filter`, and their errors `metric_stderr,filter`."""
    results, scores = found["results"].get(benchmark, {}), {}
    for key, value in results.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{filtered}")
        better = found.get("higher_is_better", {}).get(benchmark, {}).get(metric)
        name = metric if filtered == "none" else f"{metric} ({filtered})"
        score = Score(float(value), stderr if isinstance(stderr, float) else None)
        samples = found.get("samples", {}).get(benchmark, ())
        items = _items([sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample])
        if items is not None and np.isclose(items.mean(), score.value):
            score = Score(score.value, score.stderr, items, np.ones(len(items)))
        scores[Measure(kind, benchmark, name, better)] = score
    return scores


def _items(values: Sequence[Any]) -> np.ndarray | None:
    """The items' values, where each is one number."""
    with contextlib.suppress(TypeError, ValueError):
        items = np.array([float(value) for value in values])
        return items if len(items) else None
    return None

"""The training loop's order, with stages and phases that do nothing."""

from types import SimpleNamespace
from typing import Any

import torch

from lopt_pp.training.loop import train
from lopt_pp.training.step_plan import START


class Times:
    """Of a step on a device that is one step behind, until its losses are asked for."""

    def is_known(self) -> bool:
        return True

    def record(self) -> dict[str, Any]:
        return {"step_seconds": 1.0}


def phase(name: str, seen: list[object], **record: float) -> Any:
    def run(step: int, segment: Any) -> dict[int, dict[str, float]]:
        seen.append((name, step + 1))
        return {0: record}

    return SimpleNamespace(activity=name, run=run)


def test_what_was_trained_is_told_before_the_evaluation() -> None:
    seen: list[Any] = []
    training, evaluating = phase("training", seen, loss=2.0), phase("evaluating", seen, eval_loss=3.0)
    plan: Any = SimpleNamespace(
        phases=lambda step: {START: [evaluating], 0: [training], 1: [training, evaluating]}[step],
        unusable=lambda step: None,
        sampler=SimpleNamespace(epoch=lambda step: 0.5),
    )
    stages = [SimpleNamespace(index=0, device=torch.device("cpu"))]
    segment: Any = SimpleNamespace(
        stages=stages,
        clocks={0: SimpleNamespace(end_step=Times)},
        stop_signal=SimpleNamespace(runs=lambda step: True),
        close=lambda: None,
    )
    train(
        segment,
        plan,
        [START, 0, 1],
        lambda record: seen.append(("reported", record["step"], record.get("eval_loss"))),
        on_trained=lambda record: seen.append(("told", record["step"], record["loss"], record["step_seconds"] > 0)),
    )
    assert seen == [
        ("evaluating", 0),
        ("reported", 0, 3.0),
        ("training", 1),
        ("reported", 1, None),
        ("training", 2),
        ("told", 2, 2.0, True),
        ("evaluating", 2),
        ("reported", 2, 3.0),
    ]

"""An optimizer of the script's own, for each stage."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lopt_pp import LoptError, RunError, Trainer

ROWS = [{"prompt": f"what is {number}?", "completion": str(number)} for number in range(8)]


def trainer(inputs: Path, out: Path, more: dict[str, Any], **arguments: Any) -> Trainer:
    flags = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "lr_scheduler_type": "constant"}
    return Trainer(inputs / "model", {"output_dir": out, **flags, **more}, train_dataset=ROWS, **arguments)


def test_a_class_a_function_and_a_class_with_settings_are_one(inputs: Path, tmp_path: Path) -> None:
    """And a run goes on with the one that it began with."""
    sgd = torch.optim.SGD
    given: list[dict[str, Any]] = [
        {"optimizers": (partial(sgd, momentum=0.5), None)},
        {"optimizer_cls_and_kwargs": (sgd, {"momentum": 0.5, "lr": 1e-3})},
    ]
    made: list[list[str]] = []

    def own(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made.append([group["owner"] for group in groups])
        return sgd(groups, momentum=0.5)

    first = trainer(inputs, tmp_path / "own", {"learning_rate": 1e-3}, optimizers=own)
    assert first.train() and len(made) == 2
    for number, arguments in enumerate(given):
        out = tmp_path / str(number)
        more = {} if "optimizer_cls_and_kwargs" in arguments else {"learning_rate": 1e-3}
        other = trainer(inputs, out, more, **arguments)
        assert other.config.optim.learning_rate == 1e-3 and other.train()
        theirs = first.model.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in other.model.state_dict().items())
    again = {"learning_rate": 1e-3, "resume_from_checkpoint": "latest", "max_steps": 3}
    assert trainer(inputs, tmp_path / "own", again, optimizers=own).train()
    with pytest.raises(RunError, match=r"the state that the optimizer \(--optim\) keeps is '.*', and was '.*own'"):
        trainer(inputs, tmp_path / "own", again | {"max_steps": 4}).train()


def test_mistakes(inputs: Path, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"optimizers": (torch.optim.SGD([weight]), None)}, "a SGD has parameters already, .*: lambda groups: SGD"),
        ({"optimizers": (None, object())}, "leave the schedule out"),
        ({"optimizers": 3}, "optimizers is a int; give a class"),
        ({"optimizer_cls_and_kwargs": (int, {})}, "is not a class of optimizers"),
        ({"optimizer_cls_and_kwargs": torch.optim.SGD}, "give a class and a dict"),
        ({"optimizers": torch.optim.SGD, "optimizer_cls_and_kwargs": (torch.optim.SGD, {})}, "are both given"),
        ({"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, "says --learning_rate 1.0, and args say 0.1"),
    ]
    for arguments, error in mistakes:
        with pytest.raises(LoptError, match=error):
            trainer(inputs, tmp_path / "out", {"learning_rate": 0.1}, **arguments)
    with pytest.raises(RunError, match="optimizers makes a list; let it make"):
        trainer(inputs, tmp_path / "out", {}, optimizers=lambda groups: groups).train()
    for own in (lambda groups: torch.optim.SGD(groups[1:]), lambda groups: torch.optim.SGD([weight])):
        with pytest.raises(RunError, match=r"an optimizer that lacks \d+ of the stage's \d+ parameters and has [01] "):
            trainer(inputs, tmp_path / "out", {}, optimizers=own).train()
    with pytest.raises(RunError, match="^optimizers: SparseAdam fails in its step: .* not support dense gradients"):
        trainer(inputs, tmp_path / "out", {}, optimizers=torch.optim.SparseAdam).train()
    with pytest.raises(RunError, match="optimizer_cls_and_kwargs fails: TypeError: .*nesterof"):
        trainer(inputs, tmp_path / "out", {}, optimizer_cls_and_kwargs=(torch.optim.SGD, {"nesterof": True})).train()

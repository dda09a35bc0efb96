"""An optimizer of a script's own: a class, or a function that makes one, for each stage has its own parameters."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lopt_pp.errors import LoptError
from lopt_pp.stage.optimizer_kinds import Group, OptimizerFactory
from lopt_pp.util.user_code import describe

ClassAndSettings = tuple[type[torch.optim.Optimizer], Mapping[str, Any]]

_FLAGS = {"lr": "learning_rate", "weight_decay": "weight_decay"}
"""Settings of optimizers that are flags here, since groups of parameters have values of their own."""


@dataclass(frozen=True)
class OwnOptimizer:
    """Makes the optimizer of a stage; an `OptimizerFactory`.

    Attributes:
        make: the script's.
        argument: that has given it, for messages.
        name: what it is called in checkpoints: a run goes on with an optimizer of the same name.
    """

    make: OptimizerFactory
    argument: str
    name: str

    def __str__(self) -> str:
        return self.argument

    def __call__(self, groups: list[Group]) -> torch.optim.Optimizer:
        try:
            made = self.make(groups)
        except Exception as error:  # Whatever the user's code may raise.
            raise LoptError(f"{self.argument} fails: {describe(error)}") from error
        if not isinstance(made, torch.optim.Optimizer):
            raise LoptError(f"{self.argument} makes a {type(made).__name__}; let it make a torch.optim.Optimizer")
        given, held = ({p for group in each for p in group["params"]} for each in (groups, made.param_groups))
        if given != held:
            missing, others = len(given - held), len(held - given)
            raise LoptError(
                f"{self.argument} makes an optimizer that lacks {missing} of the stage's {len(given)} parameters and "
                f"has {others} others; let it take all parameters of the groups that it is given"
            )
        return made


def own_optimizer(
    optimizers: object, cls_and_kwargs: ClassAndSettings | None
) -> tuple[OwnOptimizer | None, dict[str, Any]]:
    """What the arguments `optimizers` and `optimizer_cls_and_kwargs` of a `Trainer` say.

    Args:
        optimizers: a class or a function, alone or in a pair whose second part is None, as TRL has pairs.
        cls_and_kwargs: a class with its settings.

    Returns:
        What makes a stage's optimizer, None where flags say it; and the flags that its settings are.

    Raises:
        LoptError: they are something else.
    """
    schedule: object = None
    if isinstance(optimizers, tuple) and len(optimizers) == 2:
        optimizers, schedule = optimizers
    if schedule is not None:
        raise LoptError("optimizers: leave the schedule out; --lr_scheduler_type and --lr_scheduler_kwargs give it")
    if isinstance(optimizers, torch.optim.Optimizer):
        name = type(optimizers).__name__
        raise LoptError(
            f"optimizers: a {name} has parameters already, and each stage has its own; give what makes one of a "
            f"stage's groups of parameters: lambda groups: {name}(groups)"
        )
    if cls_and_kwargs is None:
        if optimizers is not None and not callable(optimizers):
            raise LoptError(f"optimizers is a {type(optimizers).__name__}; give a class of optimizers or a function")
        make: Callable[..., Any] | None = optimizers
        if make is None:
            return None, {}
        named = make
        while isinstance(named, functools.partial):
            named = named.func
        return OwnOptimizer(make, "optimizers", getattr(named, "__qualname__", type(named).__qualname__)), {}
    if optimizers is not None:
        raise LoptError("optimizers and optimizer_cls_and_kwargs are both given; give one of them")
    try:
        kind, settings = cls_and_kwargs
        settings = dict(settings)
    except (TypeError, ValueError) as error:
        raise LoptError("optimizer_cls_and_kwargs: give a class and a dict of its settings") from error
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        raise LoptError(f"optimizer_cls_and_kwargs: {kind!r} is not a class of optimizers")
    flags = {_FLAGS[name]: value for name, value in settings.items() if name in _FLAGS}
    return OwnOptimizer(functools.partial(kind, **settings), "optimizer_cls_and_kwargs", kind.__qualname__), flags

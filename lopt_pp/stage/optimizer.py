"""The optimizer and learning-rate schedule of one stage."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lopt_pp.config.optim import OptimConfig
from lopt_pp.errors import LoptError
from lopt_pp.stage.optimizer_kinds import Group, OptimizerFactory, ParameterFacts, make_optimizer
from lopt_pp.stage.optimizer_offload import OffloadedState
from lopt_pp.util.user_code import describe

_IN_TRAINING = "train_weights"
"""In the state of an optimizer that averages weights: those that it trains. The weights themselves are the averages."""

_OF_GROUP = "group_"
"""Begins what the state of each parameter has of its group: numbers that the optimizer counts there."""

_AS_THE_PARAMETER = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum", "z"}
"""Of the optimizers' names for state, those of tensors with the parameter's shape and dtype."""


class Optimizer:
    """An optimizer with its schedule and gradient clipping, over the parameters of one stage.

    Args:
        parameters: of the block.
        config: as given by the user.
        learning_rate: their peak.
        num_steps: of the whole run.
        head: more parameters, of the block's own objective.
        head_learning_rate: their peak.
        facts: of all of them.
        factory: makes the optimizer in the place of the one that `config` names.

    Attributes:
        parameters: that are trained.
        inner: PyTorch's, or a library's.
        offloaded: keeps its state in main memory; None where it is on the device.
        averages: whether weights that are evaluated and saved are averages of those that are trained (schedule-free).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: OptimConfig,
        learning_rate: float,
        num_steps: int,
        head: Iterable[nn.Parameter] = (),
        head_learning_rate: float = 0.0,
        facts: ParameterFacts | None = None,
        factory: OptimizerFactory | None = None,
    ) -> None:
        # Block and head have rates of their own; within each, biases and norms are not decayed.
        owners = [
            (owner, [parameter for parameter in own if parameter.requires_grad], rate)
            for owner, own, rate in (("block", parameters, learning_rate), ("objective", head, head_learning_rate))
        ]
        facts = facts or ParameterFacts()
        self.parameters = [parameter for _, own, _ in owners for parameter in own]
        groups: list[Group] = []
        for owner, own, rate in owners:
            matrices, vectors = ([p for p in own if (p.ndim < 2) == is_vector] for is_vector in (False, True))
            for members, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
                group: Group = {"params": members, "lr": rate, "weight_decay": decay, "owner": owner}
                if facts.names:
                    group["param_names"] = [facts.names[parameter] for parameter in members]
                groups.append(group)
        groups = [group for group in groups if group["params"]]
        self.max_grad_norm = config.max_grad_norm
        warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
        self._factory = factory
        if factory is None:
            self.inner = make_optimizer(groups, config, learning_rate, warmup, facts.tables)
        else:
            self.inner = factory(groups)
        self.offloaded = _offloaded(self.inner, self.parameters) if config.optimizer_offload else None
        self.averages = callable(getattr(self.inner, "eval", None)) and callable(getattr(self.inner, "train", None))
        if self.averages:
            self.inner.train()  # type: ignore[attr-defined]
        self._in_training: dict[nn.Parameter, torch.Tensor] = {}
        """While the weights are the averages: those that are trained."""
        self._groups = {parameter: group for group in self.inner.param_groups for parameter in group["params"]}
        self._counted = [_counts(group) for group in self.inner.param_groups]
        self._block_group = next((g for g in self.inner.param_groups if g.get("owner") == "block"), None)
        self.schedule = _schedule(self.inner, config, learning_rate, warmup, num_steps)

    @property
    def learning_rate(self) -> float:
        """Of the block, for the coming step."""
        group = self._block_group or self.inner.param_groups[0]
        return float(group["lr"])

    def clip(self) -> torch.Tensor:
        """Clips the gradient, and returns its norm from before: a float32 scalar. Of sharded parameters, over all."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The state of a parameter, by the optimizer's own names: tensors and numbers. Empty before the first step."""
        state = self.inner.state.get(parameter, {}) if self.offloaded is None else self.offloaded.state_of(parameter)
        if not state:
            return {}
        own: dict[str, Any] = dict(state)
        for group, before in zip(self.inner.param_groups, self._counted, strict=True):
            if group is self._groups[parameter]:
                own |= {f"{_OF_GROUP}{key}": now for key, now in _counts(group).items() if now != before.get(key)}
        if self.averages:
            own[_IN_TRAINING] = self._in_training.get(parameter, parameter)
        return own

    def as_saved(self, parameter: torch.Tensor) -> torch.Tensor:
        """What a parameter is where it is saved or evaluated: its average, of an optimizer that averages weights."""
        if not self.averages or self._in_training or not isinstance(parameter, nn.Parameter):
            return parameter
        state = self.inner.state.get(parameter, {})
        if "z" not in state:
            return parameter
        group = self._groups[parameter]
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        # What `eval` of the schedulefree package does, without a change of the parameter.
        return torch.lerp(parameter.detach(), state["z"], 1 - 1 / beta)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While it lasts, weights are as they are to be evaluated and saved; then they are again as before, to the bit.

        They are other weights only where the optimizer averages them (schedule-free), which takes a copy of them.
        """
        if not self.averages or self._in_training:
            yield
            return
        with torch.no_grad():
            kept = {parameter: parameter.detach().clone() for parameter in self.parameters}
            self.inner.eval()  # type: ignore[attr-defined]
            self._in_training = kept
            try:
                yield
            finally:
                self.inner.train()  # type: ignore[attr-defined]
                self._in_training = {}
                for parameter, value in kept.items():
                    parameter.copy_(value)

    def settle(self) -> None:
        """Leaves the weights as they are to be saved, where no step follows."""
        if self.averages:
            self.inner.eval()  # type: ignore[attr-defined]

    def likeness(self, parameter: nn.Parameter) -> tuple[object, ...]:
        """Parameters of which this is the same have state of the same names."""
        if isinstance(self.inner, torch.optim.AdamW):
            return ()
        in_8_bits = hasattr(self.inner, "init_state") and parameter.numel() >= _LEAST_IN_8_BITS  # Of bitsandbytes.
        return id(self._groups[parameter]), parameter.ndim < 2, in_8_bits

    def has_shape_of_parameter(self, name: str) -> bool:
        """Whether state of this name has the shape and the dtype of its parameter, where it has as many dimensions."""
        return name == _IN_TRAINING or name in _AS_THE_PARAMETER

    def counts_on_device(self, parameter: nn.Parameter) -> bool:
        """Whether the count of a parameter's steps is read on its device. Others read it without waiting for that."""
        group = self._groups[parameter]
        return bool(group.get("fused") or group.get("capturable"))

    def resume(self, states: Mapping[nn.Parameter, dict[str, Any]], steps_done: int) -> None:
        """Goes on after `steps_done` steps.

        Args:
            states: of each parameter, what `state_of` gave, where and as it is to be; none for one that starts anew.
            steps_done: for the schedule of the rate.
        """
        for parameter, state in states.items():
            own = dict(state)
            for key in [key for key in own if key.startswith(_OF_GROUP)]:
                self._groups[parameter][key.removeprefix(_OF_GROUP)] = own.pop(key)
            if (trained := own.pop(_IN_TRAINING, None)) is not None:
                with torch.no_grad():
                    parameter.copy_(trained)
            self.inner.state[parameter] = own
        # The schedules of transformers are functions of the step, so their place is all their state. A new one takes
        # its first step when it is made, which is that of the place after `last_epoch`, and sets the rates.
        self.schedule = LambdaLR(self.inner, self.schedule.lr_lambdas, last_epoch=steps_done - 1)

    def step(self) -> None:
        """Applies the gradient, drops it, and moves the schedule on."""
        try:
            if self.offloaded is None:
                self.inner.step()
            else:
                self.offloaded.step()
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if self._factory is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise LoptError(
                f"{self._factory}: {type(self.inner).__name__} fails in its step: {describe(error)}; give an optimizer "
                f"whose step() takes dense gradients and needs no arguments"
            ) from error
        self.inner.zero_grad(set_to_none=True)
        self.schedule.step()


_LEAST_IN_8_BITS = 4096
"""Numbers of a parameter from which on bitsandbytes keeps its state in 8 bits."""


def check_optimizer(config: OptimConfig) -> None:
    """Sees that the optimizer and the schedule can be made, before there are any weights.

    Raises:
        LoptError: a package is missing, or settings do not fit.
    """
    Optimizer([nn.Parameter(torch.zeros(2, 2))], config, config.learning_rate, num_steps=10**6)


def _offloaded(inner: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> OffloadedState | None:
    return OffloadedState(inner, parameters[0].device) if parameters else None


def _schedule(
    optimizer: torch.optim.Optimizer, config: OptimConfig, learning_rate: float, warmup: int, num_steps: int
) -> LambdaLR:
    kind, settings = config.lr_scheduler_type, config.schedule_settings(learning_rate)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, num_steps, settings)
    except (TypeError, ValueError) as error:
        given = f" with --lr_scheduler_kwargs {config.lr_scheduler_kwargs}" if settings else ""
        raise LoptError(
            f"--lr_scheduler_type {kind}{given}: {error}; --lr_scheduler_kwargs gives it settings"
        ) from error
    assert isinstance(schedule, LambdaLR)  # All of transformers are that do not follow a metric.
    return schedule


def _counts(group: Group) -> dict[str, int | float | bool]:
    """The numbers of a group but for its rate, which is the schedule's, and for the mode that it is in."""
    numbers = {key: value for key, value in group.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if key not in ("lr", "initial_lr", "train_mode")}

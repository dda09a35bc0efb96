"""Makes the optimizer that `--optim` names, of a stage's parameter groups, with the settings transformers gives it."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.optimization import Adafactor

from lopt_pp.config.optim import OptimConfig
from lopt_pp.config.optimizer_names import check_optimizer_installed
from lopt_pp.errors import LoptError, first_line
from lopt_pp.util.compat_torch import real_tensors

Group = dict[str, Any]
"""Parameters with their settings, as PyTorch's optimizers take them: `params`, `lr`, `weight_decay`. Besides, `owner`
is `block` or `objective`, and `param_names` has the parameters' names as in checkpoints, where they are known."""

OptimizerFactory = Callable[[list[Group]], torch.optim.Optimizer]
"""Makes an optimizer of a stage's groups: a class of PyTorch's or a library's is one, if its defaults will do."""


@dataclass(frozen=True)
class ParameterFacts:
    """What an optimizer may want to know of parameters besides their shape.

    Attributes:
        names: of them, as in checkpoints: `block.model.layers.0.mlp.up_proj.weight`.
        tables: those with a row for each token or position: embeddings and output heads.
    """

    names: Mapping[nn.Parameter, str] = field(default_factory=dict)
    tables: Collection[nn.Parameter] = ()

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module]) -> "ParameterFacts":
        """Of the parameters of modules, which are given by the prefix of their tensors' names."""
        names: dict[nn.Parameter, str] = {}
        tables: set[nn.Parameter] = set()
        for prefix, module in modules.items():
            for name, parameter in module.named_parameters():
                names.setdefault(parameter, f"{prefix}.{name}")
            for part in module.modules():
                head = part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
                if isinstance(part, nn.Embedding) or head is not None:
                    owner: nn.Module = part if head is None else head
                    tables |= {parameter for _, parameter in owner.named_parameters(recurse=False)}
        return cls(names, tables)


def make_optimizer(
    groups: list[Group], config: OptimConfig, learning_rate: float, warmup_steps: int, tables: Collection[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of one stage.

    Source: `transformers.trainer_optimizer`, of which the settings are; `torch.optim.Muon`.

    Args:
        groups: of its parameters.
        config: the flags.
        learning_rate: the peak of the block's.
        warmup_steps: of the run, of which schedule-free optimizers take care themselves.
        tables: parameters that are no maps from hidden states to hidden states, though they are matrices.

    Raises:
        LoptError: the package is missing, or `--optim_args` has what the optimizer does not take.
    """
    check_optimizer_installed(config.optim)
    settings = config.optimizer_settings
    try:
        if config.optim == "muon":
            return _muon(groups, config, learning_rate, tables, settings)
        kind, defaults = _kind(config, warmup_steps, settings)
        with real_tensors():  # Also in a plan: bitsandbytes makes tables of values.
            return kind(groups, lr=learning_rate, **(defaults | settings))
    except (TypeError, ValueError) as error:
        if not settings:
            raise
        raise LoptError(f"--optim_args {config.optim_args} with --optim {config.optim}: {first_line(error)}") from error


def _kind(
    config: OptimConfig, warmup_steps: int, settings: dict[str, Any]
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    """The class of an optimizer, and the settings that the flags give it. Takes what it uses out of `settings`."""
    name = config.optim
    betas = {"betas": (config.adam_beta1, config.adam_beta2)}
    adam = {**betas, "eps": config.adam_epsilon}
    if name in ("adamw_torch_fused", "adamw_torch"):
        return torch.optim.AdamW, adam | {"fused": name == "adamw_torch_fused"}
    if name == "adafactor":
        return Adafactor, {"scale_parameter": False, "relative_step": False}
    if name == "sgd":
        return torch.optim.SGD, {}
    if name == "adagrad":
        return torch.optim.Adagrad, {}
    if name == "rmsprop":
        return torch.optim.RMSprop, {}
    if name.startswith("schedule_free"):
        return _schedule_free(name, adam, warmup_steps)
    import bitsandbytes.optim  # It takes seconds, and few runs have it.

    bits = {"optim_bits": 8 if "8bit" in name else 32, "is_paged": "paged" in name}
    if "lion" in name:
        return bitsandbytes.optim.Lion, betas | bits
    if "ademamix" in name:
        averages = (config.adam_beta1, config.adam_beta2, 0.9999)
        given = tuple(settings.pop(f"beta{number}", beta) for number, beta in enumerate(averages, 1))
        return bitsandbytes.optim.AdEMAMix, {"betas": given, "eps": config.adam_epsilon, "alpha": 5.0} | bits
    return bitsandbytes.optim.AdamW, adam | bits


def _schedule_free(
    name: str, adam: dict[str, Any], warmup_steps: int
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]:
    import schedulefree

    averaging = {"weight_lr_power": 2.0, "r": 0.0}
    if name == "schedule_free_radam":
        return schedulefree.RAdamScheduleFree, adam | averaging
    averaging["warmup_steps"] = warmup_steps
    if name == "schedule_free_sgd":
        return schedulefree.SGDScheduleFree, averaging
    return schedulefree.AdamWScheduleFree, adam | averaging


def _muon(
    groups: Sequence[Group],
    config: OptimConfig,
    learning_rate: float,
    tables: Collection[nn.Parameter],
    settings: dict[str, Any],
) -> torch.optim.Optimizer:
    """Muon for the matrices of layers, AdamW for embeddings, output heads, vectors and experts that are stacked."""
    known = set(tables)
    parts: list[list[Group]] = [[], []]
    for group in groups:
        for part, is_muons in zip(parts, (True, False), strict=True):
            chosen = [
                index
                for index, parameter in enumerate(group["params"])
                if (parameter.ndim == 2 and parameter not in known) == is_muons
            ]
            own = {
                key: [value[index] for index in chosen] if key in ("params", "param_names") else value
                for key, value in group.items()
            }
            if chosen:
                part.append(own)
    # A step as large as AdamW's, so that --learning_rate means for both what it means for AdamW.
    defaults = {"adjust_lr_fn": "match_rms_adamw"} | settings
    made: list[torch.optim.Optimizer] = []
    if parts[0]:
        made.append(torch.optim.Muon(parts[0], lr=learning_rate, **defaults))
    if parts[1]:
        betas = (config.adam_beta1, config.adam_beta2)
        made.append(torch.optim.AdamW(parts[1], lr=learning_rate, betas=betas, eps=config.adam_epsilon, fused=True))
    return Together(made, learning_rate)


class Together(torch.optim.Optimizer):
    """Several optimizers as one: its groups are theirs, and its state too."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer], learning_rate: float) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {"lr": learning_rate})
        self.parts = parts
        self.state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Makes the step of each."""
        for part in self.parts:
            part.step()

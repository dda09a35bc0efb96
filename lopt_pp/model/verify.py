"""Checks, before any work is done, that a model class splits exactly.

A miniature of the model is run whole and as a chain of blocks, cut at the same boundaries; the logits must be equal bit
for bit. A family whose layers share state across a boundary, or whose forward does something between the blocks that
the split does not carry, is refused here instead of being trained wrongly.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec
from lopt_pp.model.pretrained import quiet
from lopt_pp.model.structure import ModelStructure, find_layers, modules_around
from lopt_pp.util.compat_transformers import attention_of, set_attention

TOKENS = 13
VOCABULARY = 96


def check_split(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, specs: Sequence[BlockSpec]
) -> ModelStructure:
    """Proves on a miniature that the blocks at `specs`, chained, are the whole model.

    Args:
        model_class: the whole model's class.
        config: the whole model's config.
        specs: the blocks, in order.

    Returns:
        The structure of the class, as found by running the miniature.

    Raises:
        LoptError: the class does not split exactly (or is not causal); the text says why.
    """
    name = model_class.__name__
    structure, logits, chained = _on_miniature(
        config, lambda small: _whole_and_chained(model_class, small, specs), f"{name} cannot be split"
    )
    if not torch.equal(logits, chained):
        difference = (logits - chained).abs().max().item()
        raise LoptError(
            f"{name} cannot be split exactly: the chained blocks ({', '.join(map(str, specs))}) give other logits than "
            f"the whole model (by up to {difference:.3g}); its layers depend on something besides the hidden "
            f"states that they get"
        )
    return structure


def check_sample(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, structure: ModelStructure, spec: BlockSpec
) -> None:
    """Proves on a miniature that layers out of a model give as one block what they give one by one.

    Args:
        model_class: the whole model's class.
        config: the whole model's config.
        structure: of the class.
        spec: the layers, and what follows the last one.

    Raises:
        LoptError: they do not, or do not run at all; the text says why.
    """
    reason = f"{model_class.__name__} cannot give {spec} to an auxiliary network"
    singles = [BlockSpec(1 + (layer == spec.layers[-1]), 3, layer, layer + 1) for layer in spec.layers]
    together, one_by_one = _on_miniature(
        config, lambda small: _sampled(model_class, small, structure, [[spec], singles]), reason
    )
    if not torch.equal(together, one_by_one):
        raise LoptError(f"{reason}: its layers depend on something besides the hidden states that they get")


_Result = TypeVar("_Result")


def _on_miniature(
    config: PreTrainedConfig,
    check: Callable[[PreTrainedConfig], _Result],
    reason: str,
) -> _Result:
    """Runs a check with the config of a miniature.

    Raises:
        LoptError: it cannot be run; or that of the check.
    """
    failure = Exception()
    # Heads as narrow as most families bear; where one does not (rotary factors listed by dimension), its own width.
    for widest_head in (32, None):
        try:
            return check(miniature_config(config, widest_head))
        except LoptError:
            raise
        except Exception as error:  # Whatever a class of transformers, or the user's own, may raise.
            failure = error
    raise LoptError(f"{reason}: its miniature fails with: {first_line(failure)}") from failure


def miniature_config(config: PreTrainedConfig, widest_head: int | None = None) -> PreTrainedConfig:
    """`config` with the same layers and switches but few heads and experts, and small dimensions.

    Args:
        config: of the whole model.
        widest_head: the most that a head's dimension may be; None leaves it as it is.
    """
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    small_head_dim = min(head_dim, widest_head or head_dim)
    small_key_value_heads = min(key_value_heads, 2)
    small_heads = small_key_value_heads * min(heads // key_value_heads, 2)
    sizes = {
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_key_value_heads,
        "head_dim": small_head_dim,
        "hidden_size": small_heads * small_head_dim,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "vocab_size": VOCABULARY,
        "sliding_window": TOKENS // 3,
        "max_position_embeddings": 64,
    }
    for name, size in sizes.items():
        is_computed = isinstance(getattr(type(config), name, None), property)
        if getattr(config, name, None) is not None and not is_computed:
            setattr(small, name, size)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        # Group-limited routing divides the experts evenly, so those families keep theirs.
        if (experts := getattr(config, name, None)) is not None and not getattr(config, "n_group", None):
            setattr(small, name, min(experts, max(8, getattr(config, "num_experts_per_tok", None) or 8)))
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, token, None) is not None:
            setattr(small, token, 0)
    small.dtype = torch.float32
    if "flash" in (attention_of(config) or ""):
        set_attention(small, "sdpa")  # Flash attention runs on GPUs only.
    small.tie_word_embeddings = False
    return small


def _whole_and_chained(
    model_class: type[PreTrainedModel], small: PreTrainedConfig, specs: Sequence[BlockSpec]
) -> tuple[ModelStructure, torch.Tensor, torch.Tensor]:
    """Builds the miniature; returns its structure, and its logits as a whole and as chained blocks."""
    with miniature(model_class, small) as whole:
        # One row is padded on the right, as in training.
        input_ids = torch.randint(3, VOCABULARY, (2, TOKENS))
        input_ids[1, TOKENS // 2 :] = 0
        structure, logits = _trace(whole, input_ids)
        _check_causal(whole, input_ids, logits)
        builder = BlockBuilder(model_class, small, structure)
        return structure, logits, chain(builder, whole.state_dict(), specs, input_ids)


def _sampled(
    model_class: type[PreTrainedModel],
    small: PreTrainedConfig,
    structure: ModelStructure,
    ways: Sequence[Sequence[BlockSpec]],
) -> list[torch.Tensor]:
    """The miniature's logits where random hidden states go through each of several chains of later blocks."""
    with miniature(model_class, small) as whole:
        received = torch.randn(2, TOKENS, small.hidden_size)
        state = whole.state_dict()
        builder = BlockBuilder(model_class, small, structure)
        return [chain(builder, state, specs, received) for specs in ways]


def _trace(model: PreTrainedModel, input_ids: torch.Tensor) -> tuple[ModelStructure, torch.Tensor]:
    """Runs the model and notes which modules around the layers run before the first and which after the last."""
    layers = find_layers(model)
    around = list(modules_around(model, layers))
    place, places = "before", {name: set[str]() for name in around}

    def enter(*_: object) -> None:
        nonlocal place
        place = "among"

    def leave(*_: object) -> None:
        nonlocal place
        place = "after"

    features: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
        features.append(output[0])

    # Hooks on the first and the last layer tell whatever runs meanwhile where it is.
    with contextlib.ExitStack() as hooks:
        hooks.callback(model.get_submodule(layers.rpartition(".")[0]).register_forward_hook(keep).remove)
        stack = list(model.get_submodule(layers).children())
        hooks.callback(stack[0].register_forward_pre_hook(enter).remove)
        hooks.callback(stack[-1].register_forward_hook(leave).remove)
        for name in around:
            note = lambda *_, name=name: places[name].add(place)  # noqa: E731
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(note).remove)
        logits = model(input_ids=input_ids, use_cache=False).logits
    # A module that both blocks would need, or that none would, cannot be given to one of them.
    for name, seen in places.items():
        if seen not in ({"before"}, {"after"}):
            where = "nowhere" if not seen else "more than one place" if len(seen) > 1 else "the layers themselves"
            raise LoptError(f"{type(model).__name__} cannot be split: its module {name} is used in {where}")
    stray = [
        name for name, _ in model.named_parameters() if not name.startswith((layers + ".", *(a + "." for a in around)))
    ]
    if stray:
        raise LoptError(
            f"{type(model).__name__} cannot be split: its parameters {', '.join(stray)} belong to no module"
        )
    inputs = tuple(name for name in around if places[name] == {"before"})
    outputs = tuple(name for name in around if places[name] == {"after"})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain_head = (
        type(head) is nn.Linear and features[0].shape[-1] == head.in_features and torch.equal(head(features[0]), logits)
    )
    return ModelStructure(
        layers, inputs, outputs, names[id(embedding.weight)], names[id(head.weight)], plain_head
    ), logits


def _check_causal(model: PreTrainedModel, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
    changed = input_ids.clone()
    changed[:, -1] = 1
    if not torch.allclose(model(input_ids=changed, use_cache=False).logits[:, :-1], logits[:, :-1], atol=1e-4):
        raise LoptError(f"{type(model).__name__} is not causal: a later token changes the logits of earlier ones")


def chain(
    builder: BlockBuilder,
    state: Mapping[str, torch.Tensor],
    specs: Sequence[BlockSpec],
    entering: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs the blocks one after another, each built and loaded as in training, and returns the logits.

    What enters is token ids where the first of them is the model's first, else hidden states.
    """
    for spec in specs:
        own = {name: tensor for name, tensor in state.items() if builder.structure.owns(spec, name)}
        block = builder.from_state_dict(spec, own, "the miniature")
        name = "input_ids" if spec.is_first else "hidden_states"
        output = block(**{name: entering}, position_ids=position_ids)
        entering = output.hidden_states
    assert output.logits is not None
    return output.logits


@contextlib.contextmanager
def miniature(model_class: type[PreTrainedModel], small: PreTrainedConfig) -> Iterator[PreTrainedModel]:
    """A model of a small config with random weights; meanwhile nothing has a gradient or changes torch's seed."""
    with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        whole = model_class(small).float().eval()
        # Initial values hide mistakes: a norm of ones and a bias of zeros are the same in every layer.
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        yield whole

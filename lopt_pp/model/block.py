"""Cuts a causal language model of `transformers` into contiguous blocks of layers.

A block is the model's own class with the parts that other blocks own left out, so masks, rotary embeddings, sliding
windows, attention kernels and gradient checkpointing come from `transformers` unchanged. Its parameters keep the names
that they have in the whole model: a tensor of layer 17 is called `model.layers.17...` in whichever block it lives.
"""

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import register_dataclass
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.model.balancing import RouterBalancing
from lopt_pp.model.partition import BlockSpec
from lopt_pp.model.structure import ModelStructure
from lopt_pp.util.compat_transformers import packing_known, pass_for


class _Layers(nn.ModuleList):
    """Some of a model's layers, named by their numbers in the whole model, indexed from 0."""

    def __init__(self, layers: Iterable[nn.Module] = (), numbers: Iterable[int] | None = None) -> None:
        super().__init__()
        for number, layer in zip(itertools.count() if numbers is None else numbers, layers, strict=False):
            self.add_module(str(number), layer)

    def __getitem__(self, index: int | slice) -> Any:
        layers = list(self.children())
        return _Layers(layers[index]) if isinstance(index, slice) else layers[index]


class _Elsewhere(nn.Module):
    """Replaces the embedding in a later block. Its value is never used: the received hidden states replace it."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def block_class(
    model_class: type[PreTrainedModel], structure: ModelStructure, spec: BlockSpec
) -> type[PreTrainedModel]:
    """The subclass of `model_class` that has only the parts of the block at `spec`.

    `from_pretrained` of this class is `transformers`' own: it builds the model on the meta device, where the cut costs
    no memory, and then loads whatever parameters are left. The layers are built from the whole model's config, so each
    knows its true number; only the model around them gets a config of the block's own depth.
    """

    class Block(model_class):  # type: ignore[valid-type, misc]
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            parent_name, _, list_name = structure.layers.rpartition(".")
            parent = self.get_submodule(parent_name)
            layers = list(parent.get_submodule(list_name).children())
            setattr(parent, list_name, _Layers([layers[number] for number in spec.layers], spec.layers))
            parent.config = block_config(config, spec)
            if not spec.is_first:
                for name in structure.inputs:
                    self.set_submodule(name, _Elsewhere())
            if not spec.is_last:
                for name in structure.outputs:
                    self.set_submodule(name, nn.Identity())

    pass_for(Block, model_class)
    return Block


def block_config(config: PreTrainedConfig, spec: BlockSpec) -> PreTrainedConfig:
    """`config` with the depth of the block, and of each list with one entry per layer the block's entries."""
    depth = config.num_hidden_layers
    block = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(block, name, type(value)(value[number] for number in spec.layers))
    block.num_hidden_layers = len(spec.layers)
    return block


@dataclass(frozen=True)
class BlockOutput:
    """What a block's forward gives.

    Attributes:
        inputs: `[sequences, tokens, hidden]`, what entered the first layer: the embedding output on the first block,
            the received hidden states elsewhere. Detached.
        hidden_states: `[sequences, tokens, hidden]`, what left the last layer, before any final norm.
        logits: `[sequences, kept tokens, vocabulary]` on the last block, unless they are left to the loss; None
            elsewhere.
        features: `[sequences, tokens, hidden]` on the last block where the logits are left to the loss: what
            enters `head`.
        head: the output head, with `features`.
    """

    inputs: torch.Tensor
    hidden_states: torch.Tensor
    logits: torch.Tensor | None
    features: torch.Tensor | None = None
    head: nn.Linear | None = None


# Lets PyTorch's hooks (of sharding) find the tensors in it.
register_dataclass(BlockOutput)


class BlockModel(nn.Module):
    """Runs one block: token ids in on the first, hidden states in on the others; logits out on the last.

    Args:
        model: a model of `block_class`.
        structure: of the model's class.
        spec: the block's place.

    Attributes:
        own_dtypes: of each parameter, by the pretrained model's files; empty where they were not read from these.
        balancing: of its routers; None where they are not balanced.
    """

    def __init__(self, model: PreTrainedModel, structure: ModelStructure, spec: BlockSpec) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.own_dtypes: dict[str, torch.dtype] = {}
        self.balancing: RouterBalancing | None = None
        self._structure = structure
        self._received: torch.Tensor | None = None
        self._entered: torch.Tensor | None = None
        self._left: torch.Tensor | None = None
        layers = list(model.get_submodule(structure.layers).children())
        layers[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        layers[-1].register_forward_hook(self._leave)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers of the block, in order."""
        return list(self.model.get_submodule(self._structure.layers).children())

    def balance_routers(self, coefficient: float, num_replicas: int) -> None:
        """Lets the block learn to share tokens out evenly among experts, besides what else it learns from.

        Args:
            coefficient: of the loss of all layers of the model; a block has its layers' share of it.
            num_replicas: that the loss is a mean over.
        """
        share = len(self.spec.layers) / self.model.config.num_hidden_layers
        self.balancing = RouterBalancing(self.model, coefficient * share, num_replicas)

    def freeze_embeddings(self) -> None:
        """Freezes what comes before the layers (token and position embeddings)."""
        for name in self._structure.inputs:
            self.model.get_submodule(name).requires_grad_(False)

    def _enter(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Lets the received hidden states into the first layer, whatever the family's forward made of its inputs.

        Some families scale, shift or drop out what they are given before the layers (Granite, Gemma 2, GPT-2). The
        first block has done that once; a later block must not do it again.
        """
        own = args[0] if args else kwargs["hidden_states"]
        if self._received is not None and self._received is not own:
            # Kept with the tensor that it replaces: checkpointing runs this hook again, in backward, on that tensor.
            own.received = self._received
        entering = getattr(own, "received", own)
        self._entered = entering.detach()
        return ((entering, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entering})

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """Keeps what leaves the last layer, before anything that the family's forward does after it."""
        self._left = output if isinstance(output, torch.Tensor) else output[0]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        leave_logits: bool = False,
        position_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> BlockOutput:
        """Runs the block.

        Args:
            input_ids: int64 `[sequences, tokens]`, on the first block.
            hidden_states: `[sequences, tokens, hidden]`, on the others.
            logits_to_keep: on the last block, the token positions (int64 `[n]`) whose logits are wanted; 0 is all.
            leave_logits: on the last block, whether to leave the logits to the loss where the head is plain.
            position_ids: int64 `[sequences, tokens]`, where several rows of the data share a sequence: each counts
                from 0, by which `transformers` keeps them apart. None where each is a sequence of its own.
            token_mask: bool `[sequences, tokens]`, True on real tokens, whose routers are to be balanced while the
                block learns; None where there are none, or nothing is to be balanced.
        """
        inputs = {"input_ids": input_ids} if self.spec.is_first else {"inputs_embeds": hidden_states}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        wanted: dict[str, Any] = {"use_cache": False}
        balancing = self.balancing if token_mask is not None and torch.is_grad_enabled() else None
        if hasattr(self.model.config, "output_router_logits"):
            wanted["output_router_logits"] = balancing is not None
        self._received = None if self.spec.is_first else hidden_states
        logits = features = head = None
        # The layers' parent runs them; on all but the last block there is nothing around it that matters.
        runner = self.model.get_submodule(self._structure.layers.rpartition(".")[0])
        with packing_known(share=position_ids is not None):
            if not self.spec.is_last:
                outputs: Any = runner(**inputs, **wanted)
            elif leave_logits and self._structure.plain_head:
                outputs = runner(**inputs, **wanted)
                features, head = outputs[0], self.model.get_output_embeddings()
            else:
                outputs = self.model(**inputs, logits_to_keep=logits_to_keep, **wanted)
                logits = outputs.logits
        entered, left = self._entered, self._left
        self._received = self._entered = self._left = None
        assert entered is not None and left is not None
        if balancing is not None and token_mask is not None:
            routers = outputs.router_logits
            if features is not None:
                features = balancing.add(features, routers, token_mask)
            elif logits is not None:
                logits = balancing.add(logits, routers, token_mask)
            else:
                left = balancing.add(left, routers, token_mask)
        return BlockOutput(entered, left, logits, features, head)

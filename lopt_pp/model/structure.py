"""Finds where the parts of a model class are: its layers, and what is before and after them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from lopt_pp.errors import LoptError
from lopt_pp.model.partition import BlockSpec


@dataclass(frozen=True)
class ModelStructure:
    """Where the parts of a model class are, as module names.

    Attributes:
        layers: the list of decoder layers, such as `model.layers`.
        inputs: the modules with parameters that run before the layers (embeddings): the first block's.
        outputs: the modules with parameters that run after the layers (final norm, output head): the last block's.
        embedding: the parameter of the input embedding.
        head: the parameter of the output head, which some models tie to the input embedding.
        plain_head: whether the logits are the head's linear map of what the layers' parent gives, and nothing more (no
            scale, no soft cap), so that a loss may make them itself.
    """

    layers: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    embedding: str
    head: str
    plain_head: bool = False

    def owns(self, spec: BlockSpec, tensor: str) -> bool:
        """Whether the tensor of this name in the whole model belongs to the block at `spec`."""
        if tensor.startswith(self.layers + "."):
            layer = tensor.removeprefix(self.layers + ".").split(".")[0]
            return layer in map(str, spec.layers)  # A file may have any names at all.
        return (spec.is_first and _within(tensor, self.inputs)) or (spec.is_last and _within(tensor, self.outputs))


def _within(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def find_layers(model: PreTrainedModel) -> str:
    """The name of the list of decoder layers: the one `nn.ModuleList` outside the layers as long as the model is deep.

    Raises:
        LoptError: there is none, or more than one.
    """
    depth = model.config.num_hidden_layers
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, module in lists.items() if len(module) == depth and not _within(name, set(lists) - {name})]
    if len(found) != 1:
        raise LoptError(
            f"{type(model).__name__} cannot be split: {len(found)} module lists have its {depth} layers"
            f"{' (' + ', '.join(found) + ')' if found else ''}, and just one is expected"
        )
    return found[0]


def modules_around(model: nn.Module, layers: str) -> Iterator[str]:
    """The names of the topmost modules with parameters that are outside the layers."""
    ancestors = [".".join(layers.split(".")[:depth]) for depth in range(layers.count(".") + 1)]
    for ancestor in ancestors:
        for name, child in model.get_submodule(ancestor).named_children():
            path = f"{ancestor}.{name}" if ancestor else name
            if path not in (*ancestors, layers) and next(child.parameters(), None) is not None:
                yield path

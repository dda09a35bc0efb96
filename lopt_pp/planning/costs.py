"""What the parts of a model cost: timed, or computed."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.model.structure import ModelStructure


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a model take for a microbatch: forward, backward and their share of the optimizer step.

    Attributes:
        layers: of each decoder layer, on the last stage.
        earlier_layers: the same on an earlier stage, which may only run forward, always or in some microbatches.
        embedding: of what comes before the layers.
        local_head: of an earlier stage's own loss, with its head or auxiliary network.
        output: of the final norm, the output head and the task loss.
    """

    layers: tuple[float, ...]
    earlier_layers: tuple[float, ...]
    embedding: float
    local_head: float
    output: float

    def of(self, start: int, stop: int, num_local_heads: int) -> float:
        """Of the layers `start` to `stop - 1`, with what comes before or after them, and local heads among them."""
        is_last = stop == len(self.layers)
        ends = (self.embedding if start == 0 else 0.0) + (self.output if is_last else 0.0)
        layers = self.layers if is_last else self.earlier_layers
        return sum(layers[start:stop]) + ends + num_local_heads * self.local_head

    def __str__(self) -> str:
        lowest, highest = (1e3 * end(*self.layers, *self.earlier_layers) for end in (min, max))
        layer = f"{lowest:.1f}" if highest == lowest else f"{lowest:.1f} to {highest:.1f}"
        return (
            f"a layer {layer} ms, the embedding {1e3 * self.embedding:.1f} ms, a local head "
            f"{1e3 * self.local_head:.1f} ms, the output head with its loss {1e3 * self.output:.1f} ms"
        )


def layer_kinds(model_class: type[PreTrainedModel], config: PreTrainedConfig, structure: ModelStructure) -> list[str]:
    """Of each layer what makes layers cost the same: its tensors' shapes, and its entries in lists of the config."""
    with torch.device("meta"):
        layers = model_class(config).get_submodule(structure.layers).children()
    lists = [value for value in vars(config).values() if _is_per_layer(value, config.num_hidden_layers)]
    return [
        repr(
            (
                [(name, tuple(tensor.shape)) for name, tensor in layer.state_dict().items()],
                [value[number] for value in lists],
            )
        )
        for number, layer in enumerate(layers)
    ]


def _is_per_layer(value: object, depth: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == depth

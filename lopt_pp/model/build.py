"""Builds blocks: on the meta device, with random weights, with given ones, or with those of the pretrained model.

Every block that is trained, run, planned or exported is made here, so whatever is to be done to each of them (adapters,
quantized weights) has one place.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.errors import LoptError
from lopt_pp.model.block import BlockModel, block_class
from lopt_pp.model.dtypes import own_dtypes
from lopt_pp.model.partition import BlockSpec
from lopt_pp.model.stored import check_are_floats, check_stored
from lopt_pp.model.structure import ModelStructure
from lopt_pp.model.vocabulary import AddedRows
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.util.compat_transformers import Deferred, kept_as, one_after_another, parameter_names

Keep = Callable[[nn.Parameter], nn.Parameter]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class BlockBuilder:
    """Builds the blocks of one model. The last block has an output head of its own, also where the model ties it.

    Attributes:
        model_class: the whole model's class.
        config: the whole model's config.
        structure: of the class, as `check_split` finds it.
        ties_embeddings: whether a block that is the whole model has its input and output embeddings tied, as the model
            has them.
        added: the rows that the embeddings get, beyond those in the files, as `config` has them; None for none.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    structure: ModelStructure
    ties_embeddings: bool = False
    added: AddedRows | None = None

    def on_meta(self, spec: BlockSpec) -> BlockModel:
        """The block at `spec` without memory for its weights, to be counted or planned with."""
        with torch.device("meta"):
            return self._block(spec, self._class(spec)(self._config(spec)))

    def with_random_weights(self, spec: BlockSpec) -> BlockModel:
        """The block at `spec` with random weights in float32, without the rest of the model, to measure with."""
        state = self.on_meta(spec).model.state_dict()
        drawn = {name: 0.02 * torch.randn(tensor.shape) for name, tensor in state.items()}
        return self.from_state_dict(spec, drawn, "random weights")

    def from_pretrained(
        self, spec: BlockSpec, weights: PretrainedWeights, device: torch.device = _CPU, keep: Keep | None = None
    ) -> BlockModel:
        """The block at `spec` with its pretrained weights, in float32; no other tensors are read.

        They are read one after another, each straight to its place: in main memory there is never more of them than one
        besides those that stay there. Where the pretrained model ties the output head to the input embedding, the last
        block gets a copy of its own.

        Args:
            spec: the block's place.
            weights: the whole model's files.
            device: where the parameters are put. Buffers are on the CPU.
            keep: makes of a parameter, as soon as it is read, what the block has in its place; None for itself.

        Raises:
            LoptError: tensors of the block are missing from the files, have another shape, or are whole numbers.
        """
        names = parameter_names(self.whole, weights.files)
        own = [stored for stored, name in names.items() if self.structure.owns(spec, name)]
        formats = weights.formats(own)
        check_are_floats(formats, {name for name, _ in self.whole.named_parameters()}, names, weights.name_or_path)
        sources = {stored: stored for stored in own}
        is_stored_once = self.config.tie_word_embeddings and self.structure.head not in names.values()
        if spec.is_last and is_stored_once and not self._config(spec).tie_word_embeddings:
            for tied in [stored for stored, name in names.items() if name == self.structure.embedding]:
                sources[self.structure.head] = tied
        dtypes = weights.dtypes(sources.values())
        stored = {name: dtypes[source] for name, source in sources.items() if source in dtypes}

        def read(source: str, dtype: torch.dtype | None) -> torch.Tensor:
            return weights.read([source], device, dtype)[source]

        deferred = {name: Deferred(functools.partial(read, source)) for name, source in sources.items()}
        if self.added is not None:
            grow = functools.partial(self._grown, self.added, weights, names, device)
            places = {name: names.get(name, name) for name in sources}
            parts = (self.structure.embedding, *self._head_names)
            deferred |= {name: Deferred(functools.partial(grow, own)) for name, own in places.items() if own in parts}
        with weights.kept_open(), one_after_another(), kept_as(keep):
            block = self.from_state_dict(spec, deferred, weights.name_or_path)
        block.own_dtypes = own_dtypes(stored, {**names, self.structure.head: self.structure.head})
        return block

    def from_state_dict(
        self, spec: BlockSpec, state: Mapping[str, torch.Tensor] | Mapping[str, Deferred], source: str
    ) -> BlockModel:
        """The block at `spec` with the tensors of `state`, in float32 and in evaluation mode, as `transformers` loads.

        Args:
            spec: the block's place.
            state: the block's tensors, named and laid out as `transformers` stores them today or stored them once.
            source: where they come from, for messages.

        Raises:
            LoptError: some are missing or have another shape.
        """
        try:
            loaded: Any = self._class(spec).from_pretrained(
                None,
                config=self._config(spec),
                state_dict=dict(state),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They are refused below, by name.
            )
        except RuntimeError as error:
            if "conversion" not in str(error):
                raise
            raise LoptError(
                f"{source}: tensors of stage {spec.stage} ({spec}) that {self.model_class.__name__} fuses into "
                f"one, such as those of experts, are incomplete or of unequal shapes"
            ) from error
        model, info = loaded
        problems = sorted(
            [
                *info["missing_keys"],
                *(f"{name} (has {list(has)}, needs {list(needs)})" for name, has, needs in info["mismatched_keys"]),
            ]
        )
        if problems:
            shown = ", ".join(problems[:5]) + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise LoptError(f"{source}: tensors of stage {spec.stage} are missing or of another shape: {shown}")
        return self._block(spec, model)

    @property
    def _head_names(self) -> tuple[str, str]:
        """Of the output head's weight and bias, which it may not have."""
        return self.structure.head, self.structure.head.removesuffix("weight") + "bias"

    def _grown(
        self,
        added: AddedRows,
        weights: PretrainedWeights,
        names: Mapping[str, str],
        device: torch.device,
        part: str,
        dtype: torch.dtype | None,
    ) -> torch.Tensor:
        """A tensor of the embeddings with its further rows, which depend on the input's and the output's together."""
        places = {name: stored for stored, name in names.items()}
        own = [places[name] for name in (self.structure.embedding, *self._head_names) if name in places]
        read = {names[name]: tensor for name, tensor in weights.read(own, _CPU, torch.float32).items()}
        embedding, (head, bias) = read[self.structure.embedding], map(read.get, self._head_names)
        if self.config.tie_word_embeddings and (head is None or torch.equal(head, embedding)):
            head = bias = None
        resized = added.resize(embedding, head, bias)
        found = dict(zip((self.structure.embedding, *self._head_names), resized, strict=True))[part]
        tensor = resized[0] if found is None else found
        return tensor.to(device, dtype)

    def stores_tied_embeddings(self, weights: PretrainedWeights) -> bool:
        """Whether the model's input and output embeddings are one tensor, as `transformers` loads it.

        Where its files have both, they must be equal, whatever the config says.
        """
        if not self.config.tie_word_embeddings:
            return False
        places = {name: stored for stored, name in parameter_names(self.whole, weights.files).items()}
        if self.structure.head not in places or self.structure.embedding not in places:
            return True
        head, embedding = weights.read([places[self.structure.head], places[self.structure.embedding]]).values()
        return torch.equal(head, embedding)

    def stored_dtype(self, spec: BlockSpec, weights: PretrainedWeights) -> torch.dtype | None:
        """The dtype that most numbers of a block are saved in, by the model's files, of which only headers are read."""
        names = parameter_names(self.whole, weights.files)
        own = [stored for stored, name in names.items() if self.structure.owns(spec, name)]
        sizes = {name: tensor.numel() for name, tensor in self.whole.state_dict().items()}
        numbers = Counter[torch.dtype]()
        for name, dtype in own_dtypes(weights.dtypes(own), names).items():
            numbers[dtype] += sizes.get(name, 0)
        return max(numbers, key=numbers.__getitem__, default=None)

    def unused_tensors(self, weights: PretrainedWeights) -> list[str]:
        """The tensors of the whole model's files that no block reads; see `lopt_pp.model.stored`.

        Raises:
            LoptError: they stand beside quantized weights.
        """
        return check_stored(self.whole, weights)

    def _class(self, spec: BlockSpec) -> type[PreTrainedModel]:
        return block_class(self.model_class, self.structure, spec)

    def _block(self, spec: BlockSpec, model: PreTrainedModel) -> BlockModel:
        """Every block comes by here, with its weights."""
        return BlockModel(model, self.structure, spec)

    @functools.cached_property
    def whole(self) -> PreTrainedModel:
        """The whole model on the meta device, without memory for its weights."""
        with torch.device("meta"):
            return self.model_class(self.config)

    def _config(self, spec: BlockSpec) -> PreTrainedConfig:
        return self.config if self.ties_embeddings and spec.is_first and spec.is_last else self._untied

    @functools.cached_property
    def _untied(self) -> PreTrainedConfig:
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings = False
        return config

"""The models and loads of the scaling arithmetic: counted from a config, on the meta device, without weights."""

import copy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from lopt_pp.config.compute import StageConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.block import block_config
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec, split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.objectives import reconstruction_head


@dataclass(frozen=True)
class PublicModel:
    """What a public config says of a model's size; none of these ties its embeddings.

    Attributes:
        name: of the model.
        model_type: of its architecture, in transformers.
        sizes: the config's values.
    """

    name: str
    model_type: str
    sizes: dict[str, int]


MODELS = {
    # https://huggingface.co/Qwen/Qwen2.5-7B/blob/main/config.json
    "7B": PublicModel(
        "Qwen2.5-7B",
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
    ),
    # https://huggingface.co/Qwen/Qwen2.5-32B/blob/main/config.json
    "32B": PublicModel(
        "Qwen2.5-32B",
        "qwen2",
        {
            "vocab_size": 152064,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    ),
    # https://huggingface.co/meta-llama/Llama-3.1-70B/blob/main/config.json
    "70B": PublicModel(
        "Llama-3.1-70B",
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
}

_LIKE_LLAMA = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Load:
    """What a stage computes on, and how.

    Attributes:
        rows: of a microbatch.
        tokens: of a row, all of them real.
        accumulation: microbatches of an optimizer step.
        stage: dtype and checkpointing, as the trainer's flags say.
        data_parallel: replicas of each stage.
        sharding: what the replicas share out among them, as `--sharding`.
    """

    rows: int
    tokens: int
    accumulation: int
    stage: StageConfig
    data_parallel: int = 1
    sharding: Literal["none", "full"] = "none"

    @property
    def microbatch(self) -> int:
        """Tokens of a microbatch."""
        return self.rows * self.tokens

    @property
    def residual_bytes(self) -> int:
        """Of a number in the residual stream, which has the dtype of the weights."""
        return self.stage.parameter_dtype.itemsize

    @property
    def compute_bytes(self) -> int:
        """Of a number that enters or leaves a matrix product, or crosses a boundary."""
        return self.stage.compute_dtype.itemsize


@dataclass(frozen=True)
class BlockSize:
    """Numbers of parameters in one block.

    Attributes:
        block: all, without a local head.
        layer: of its largest layer.
        layers_linear: of the linear maps in its layers, biases included, which autocast copies.
        local_head: of the reconstruction head; 0 on the last block.
        num_layers: how many layers it has.
    """

    block: int
    layer: int
    layers_linear: int
    local_head: int
    num_layers: int

    @property
    def total(self) -> int:
        """All that the stage trains."""
        return self.block + self.local_head


class Model:
    """A model known by its config.

    Args:
        config: of a model like Llama; its embeddings are taken as untied, as the trainer unties them.

    Raises:
        LoptError: the formulas do not fit the model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        if config.model_type not in _LIKE_LLAMA:
            raise LoptError(
                f"{config.model_type}: the formulas hold for layers like Llama's ({', '.join(_LIKE_LLAMA)})"
            )
        self.config = copy.deepcopy(config)
        self.config.tie_word_embeddings = False
        self.model_class = model_class_of(self.config)
        # Two layers show where everything is as well as eighty do.
        self.structure = check_split(
            self.model_class, block_config(self.config, BlockSpec(0, 1, 0, 2)), split_evenly(2, num_stages=2)
        )
        heads = self.config.num_attention_heads
        self.hidden: int = self.config.hidden_size
        self.intermediate: int = self.config.intermediate_size
        self.vocabulary: int = self.config.vocab_size
        self.num_layers: int = self.config.num_hidden_layers
        self.heads: int = heads
        head_dim = getattr(self.config, "head_dim", None) or self.hidden // heads
        self.queries: int = heads * head_dim
        self.keys: int = self.config.num_key_value_heads * head_dim
        self._sizes: dict[tuple[bool, bool, int], BlockSize] = {}

    @classmethod
    @cache
    def load(cls, name: str) -> "Model":
        """One of `MODELS`, a config file, or the directory of one."""
        if name in MODELS:
            sizes: dict[str, Any] = dict(MODELS[name].sizes)
            return cls(CONFIG_MAPPING[MODELS[name].model_type](**sizes))
        path = Path(name)
        if not path.exists():
            raise LoptError(f"--model {name}: give {', '.join(MODELS)}, or a config.json or its directory")
        return cls(AutoConfig.from_pretrained(path))

    def size(self, spec: BlockSpec) -> BlockSize:
        """Counts the parameters of a block. All layers of these models are alike, so blocks of one length are, too."""
        kind = spec.is_first, spec.is_last, spec.stop - spec.start
        if kind not in self._sizes:
            self._sizes[kind] = self._count(spec)
        return self._sizes[kind]

    def _count(self, spec: BlockSpec) -> BlockSize:
        block = BlockBuilder(self.model_class, self.config, self.structure).on_meta(spec)
        linear = [module for layer in block.layers for module in layer.modules() if isinstance(module, nn.Linear)]
        return BlockSize(
            block=_numel(block),
            layer=max(map(_numel, block.layers)),
            layers_linear=sum(map(_numel, linear)),
            local_head=0 if spec.is_last else self.local_head,
            num_layers=spec.stop - spec.start,
        )

    @cached_property
    def local_head(self) -> int:
        """Parameters of a reconstruction head."""
        return _numel(reconstruction_head(self.hidden, torch.Generator()))


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""The model to post-train."""

from dataclasses import dataclass, field
from typing import ClassVar

from lopt_pp.config.fields import check_types


@dataclass(frozen=True)
class ModelConfig:
    """The model to post-train."""

    _argument_group_name: ClassVar[str] = "Model"

    model_name_or_path: str = field(
        metadata={"help": "Directory or hub id of a causal language model with safetensors weights. Required."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the hub repository."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel, as in transformers: sdpa, eager, flash_attention_2, ..."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Off, unless you have read it."}
    )

    def __post_init__(self) -> None:
        check_types(self)

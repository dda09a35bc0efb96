"""The model to post-train."""

from dataclasses import dataclass, field
from typing import ClassVar

from lopt_pp.config.fields import Resume, check_types, expand_home, flag


@dataclass(frozen=True)
class ModelConfig:
    """The model to post-train."""

    _argument_group_name: ClassVar[str] = "Model"

    model_name_or_path: str = field(
        metadata=flag(
            "Directory or hub id of a causal language model with safetensors weights. Required.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=False,
            compared=True,
            is_path=True,
        )
    )
    model_revision: str = field(
        default="main",
        metadata=flag(
            "Branch, tag or commit of the hub repository.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    attn_implementation: str | None = field(
        default=None,
        metadata=flag(
            "Attention kernel, as in transformers: sdpa, eager, flash_attention_2, ...",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    trust_remote_code: bool = field(
        default=False,
        metadata=flag(
            "Run Python code that comes with the model. Off, unless you have read it.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)

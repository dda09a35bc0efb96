"""The model to post-train."""

from dataclasses import dataclass, field
from typing import ClassVar

from lopt_pp.config.fields import Resume, check_types, expand_home, flag
from lopt_pp.errors import LoptError


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
    eos_token: str | None = field(
        default=None,
        metadata=flag(
            "Token of the vocabulary that ends an answer or a text, in place of the tokenizer's own. It is saved "
            "with the model, which then stops at it.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    pad_token: str | None = field(
        default=None,
        metadata=flag(
            "Token of the vocabulary that pads, in place of the tokenizer's own; it is saved with the model.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    added_tokens: list[str] | None = field(
        default=None,
        metadata=flag(
            "Tokens that the tokenizer gets, such as those of a chat template, if it lacks them: '<|im_start|>' "
            "'<|im_end|>'. The embeddings get rows for them, drawn around the mean of the others.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    resize_to_multiple_of: int | None = field(
        default=None,
        metadata=flag(
            "With --added_tokens, rows of the embeddings are filled up to a multiple of this number, such as 64.",
            on_resume=Resume.DERIVED,
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
        if self.resize_to_multiple_of is not None and not 1 <= self.resize_to_multiple_of <= 2**20:
            raise LoptError(f"--resize_to_multiple_of {self.resize_to_multiple_of}: at least 1, such as 64")

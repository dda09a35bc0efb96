"""How a stage computes: dtypes, gradient checkpointing, compilation."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from lopt_pp.config.fields import Resume, check_types, flag
from lopt_pp.errors import LoptError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StageConfig:
    """How a stage computes."""

    _argument_group_name: ClassVar[str] = "Computation"

    dtype: Literal["float32", "bfloat16", "pure_bfloat16"] = field(
        default="float32",
        metadata=flag(
            "Dtype of the computation and of what crosses a boundary. With bfloat16 the weights, their "
            "gradients and AdamW's state stay in float32 and each block runs under autocast, so that small updates "
            "and sums over microbatches are not lost. pure_bfloat16 holds everything in bfloat16: half the memory, "
            "and updates below 1/256 of a weight are rounded away.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata=flag(
            "Keep only what enters each layer, and compute the rest again in backward: less memory.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=flag(
            "Keep what a forward keeps for its backward in main memory instead of the GPU's: less of the latter, and "
            "time for the copies. With --gradient_checkpointing, that is what enters each layer.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    torch_compile: bool = field(
        default=False,
        metadata=flag(
            "Compile each layer with torch.compile; the first steps take longer.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    torch_compile_backend: str | None = field(
        default=None,
        metadata=flag(
            "Backend of torch.compile; by default inductor.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    torch_compile_mode: str | None = field(
        default=None,
        metadata=flag(
            "Mode of torch.compile, such as max-autotune-no-cudagraphs.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    tf32: bool = field(
        default=False,
        metadata=flag(
            "Let float32 matrix products on GPUs of the Ampere generation or newer round their inputs to TF32: "
            "several times as fast, to three digits.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    neftune_noise_alpha: float | None = field(
        default=None,
        metadata=flag(
            "Adds noise of this size to the embeddings while the first stage learns (NEFTune, arXiv 2310.05914; 5 is "
            "usual). A first stage that only runs forward adds none.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    full_determinism: bool = field(
        default=False,
        metadata=flag(
            "Take deterministic kernels only, so that a run on GPUs gives the same bits each time; slower there. On "
            "CPUs it does without.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.neftune_noise_alpha is not None and self.neftune_noise_alpha < 0:
            raise LoptError(f"--neftune_noise_alpha {self.neftune_noise_alpha}: at least 0")

    @property
    def compiles(self) -> bool:
        """Whether layers are compiled; as in transformers, either setting of that says so as well."""
        return bool(self.torch_compile or self.torch_compile_backend or self.torch_compile_mode)

    # torch is imported by whoever asks for a dtype, and not by whoever reads flags: that takes seconds.

    @property
    def compute_dtype(self) -> "torch.dtype":
        """Of the matrix products and of the hidden states that cross a boundary."""
        import torch

        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    @property
    def parameter_dtype(self) -> "torch.dtype":
        """Of the weights, their gradients and the optimizer's state."""
        import torch

        return torch.bfloat16 if self.dtype == "pure_bfloat16" else torch.float32

    @property
    def autocasts(self) -> bool:
        """Whether the computation has another dtype than the weights."""
        return self.compute_dtype != self.parameter_dtype


PLAIN = StageConfig()
"""In float32, with nothing to save memory or time."""

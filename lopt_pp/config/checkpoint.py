"""When the state of a run is saved, and what it starts from."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lopt_pp.config.fields import Resume, check_types, expand_home, flag
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a run is saved, and what it starts from."""

    _argument_group_name: ClassVar[str] = "Checkpoints"

    save_steps: int = field(
        default=500,
        metadata=flag(
            "Steps between checkpoints, in OUTPUT_DIR/checkpoint-STEP; the last step is saved as well; 0 is off. "
            "Each stage writes its own part in the background after its own step; none waits for another. One that "
            "comes due while the one before is still being written, to a slow disk, is skipped with a warning.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    save_strategy: Literal["steps", "epoch", "best"] = field(
        default="steps",
        metadata=flag(
            "When to save: every --save_steps, after each epoch, or (best) after each evaluation that is the best so "
            "far by --metric_for_best_model; the last step is saved as well.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    save_total_limit: int | None = field(
        default=None,
        metadata=flag(
            "Number of checkpoints of this run to keep; older ones are removed, but never the best with "
            "--load_best_model_at_end. By default all.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=flag(
            "Go on from a checkpoint: its directory, or 'latest' for the newest one of --output_dir "
            "(from the beginning where there is none). The weights end as if nothing had happened, on any number of "
            "processes and replicas with the same stages and rows per step. A finished run that is given a larger "
            "--max_steps or --num_train_epochs goes on from its last step.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=False,
            is_path=True,
        ),
    )

    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata=flag(
            "Dtype of the trained model's weights. auto is the pretrained model's own, tensor by tensor. Weights are "
            "rounded to it once, when the model is saved; checkpoints keep what is trained.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        if self.save_steps < 0:
            raise LoptError(f"--save_steps {self.save_steps}: at least 0")
        if self.save_total_limit is not None and self.save_total_limit < 1:
            raise LoptError(f"--save_total_limit {self.save_total_limit}: at least 1")

    @property
    def saves(self) -> bool:
        """Whether there are checkpoints."""
        return self.save_steps > 0 or self.save_strategy != "steps"

    @property
    def only_best(self) -> bool:
        """Whether a checkpoint in the middle of a run stays only where its model is the best so far."""
        return self.save_strategy == "best"

    def saves_after(self, step: int, steps_per_epoch: int) -> bool:
        """Whether a checkpoint is due when `step` steps are done, whatever evaluations say."""
        if self.only_best:
            return False
        every = steps_per_epoch if self.save_strategy == "epoch" else self.save_steps
        return every > 0 and step % every == 0

"""What a run is measured on, and when."""

from dataclasses import dataclass, field
from typing import ClassVar

from lopt_pp.config.fields import Resume, check_types, expand_home, flag
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class EvaluationConfig:
    """What a run is measured on, and when.

    Raises:
        LoptError: a value is out of range, or flags do not go together.
    """

    _argument_group_name: ClassVar[str] = "Evaluation"

    eval_file: str | None = field(
        default=None,
        metadata=flag(
            "Local file with rows that are not trained on, of the same kinds as --train_file: their loss and "
            "perplexity are measured every --eval_steps and after the last step.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=False,
            compared=True,
            is_path=True,
        ),
    )
    eval_split_size: float | None = field(
        default=None,
        metadata=flag(
            "Instead of --eval_file, hold this many of the training rows out (a whole number), or this share "
            "of them (below 1), drawn by the seed.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata=flag(
            "Instead of --eval_file, a split of --dataset_name, such as `test`.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    eval_steps: int = field(
        default=500,
        metadata=flag(
            "Steps between evaluations; 0 evaluates after the last step only.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    eval_on_start: bool = field(
        default=False,
        metadata=flag(
            "Evaluate before the first step as well, as step 0: what the pretrained model does, to compare "
            "with. A run that goes on from a checkpoint does not evaluate it again.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    per_device_eval_batch_size: int = field(
        default=8,
        metadata=flag(
            "Rows of a microbatch of an evaluation.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata=flag(
            "Save the model of the checkpoint with the lowest eval_loss (or the last step's, if its is the "
            "lowest) instead of the last. --save_steps must be a multiple of --eval_steps. --save_total_limit never "
            "removes the best checkpoint.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        sources = ("eval_file", "eval_split_size", "dataset_test_split")
        given = [f"--{name}" for name in sources if getattr(self, name) is not None]
        if len(given) > 1:
            raise LoptError(f"give one of {' and '.join(given)}: a run is evaluated on the rows of one")
        if self.eval_steps < 0:
            raise LoptError(f"--eval_steps {self.eval_steps}: at least 0")
        if self.per_device_eval_batch_size < 1:
            raise LoptError(f"--per_device_eval_batch_size {self.per_device_eval_batch_size}: at least 1")
        size = self.eval_split_size
        if size is not None and (size <= 0 or (size >= 1 and size != int(size))):
            raise LoptError(
                f"--eval_split_size {size:g}: a number of rows such as 100, or a share of them such as 0.05"
            )
        if self.load_best_model_at_end and not given:
            raise LoptError("--load_best_model_at_end needs rows to compare models on: give --eval_file")
        if self.eval_on_start and not given:
            raise LoptError(
                "--eval_on_start needs rows to evaluate on: give --eval_file, --eval_split_size or --dataset_test_split"
            )

    def check_checkpoints(self, save_steps: int) -> None:
        """Sees that the best model can be had at the end.

        Raises:
            LoptError: some checkpoint would not be evaluated.
        """
        if self.load_best_model_at_end and (save_steps == 0 or self.eval_steps == 0 or save_steps % self.eval_steps):
            raise LoptError(
                f"--load_best_model_at_end evaluates every checkpoint, so --save_steps must be a multiple of "
                f"--eval_steps; they are {save_steps} and {self.eval_steps}"
            )

"""What a run is measured on, and when."""

import math
import os
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lopt_pp.config.checkpoint import CheckpointConfig
from lopt_pp.config.fields import Resume, check_types, expand_home, flag
from lopt_pp.errors import LoptError

TOKEN_METRICS = ("mean_token_accuracy", "entropy")
"""What an evaluation can measure of single tokens; TRL calls them so."""

_NEED_ROWS = ("eval_on_start", "metric_for_best_model", "early_stopping_patience", "eval_metrics", "compute_metrics")

_LEAST = {"eval_steps": 0, "per_device_eval_batch_size": 1, "eval_delay": 0, "early_stopping_threshold": 0}

_NAMED = re.compile(r"([A-Za-z]\w*)=(.+)", re.DOTALL)
"""A set of rows with a name; `./a=b.jsonl` is a path."""


def eval_prefix(set_name: str) -> str:
    """What the names of values begin with that were measured on a set of held-out rows, as `transformers` has it.

    Args:
        set_name: of the set; empty where there is only one, without a name.
    """
    return f"eval_{set_name}_" if set_name else "eval_"


def named_file(file: str) -> tuple[str, str]:
    """The name of a set of `--eval_file`, empty where it has none, and its file."""
    match = _NAMED.fullmatch(file)
    return (match[1], match[2]) if match else ("", file)


@dataclass(frozen=True)
class EvaluationConfig:
    """What a run is measured on, and when.

    Raises:
        LoptError: a value is out of range, or flags do not go together.
    """

    _argument_group_name: ClassVar[str] = "Evaluation"

    eval_file: list[str] | None = field(
        default=None,
        metadata=flag(
            "Local file with rows that are not trained on, of the same kinds as --train_file: their loss and "
            "perplexity are measured every --eval_steps and after the last step. Several files, each with a name, are "
            "measured each by itself: --eval_file easy=easy.jsonl hard=hard.jsonl gives eval_easy_loss and "
            "eval_hard_loss.",
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
    eval_strategy: Literal["steps", "epoch"] = field(
        default="steps",
        metadata=flag(
            "When to evaluate: every --eval_steps, or after each epoch; the last step is always evaluated.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    eval_delay: float = field(
        default=0.0,
        metadata=flag(
            "Steps before the first evaluation, or epochs with --eval_strategy epoch; those before them are left out.",
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
    eval_metrics: list[str] | None = field(
        default=None,
        metadata=flag(
            "What evaluations measure besides loss and perplexity: mean_token_accuracy, the share of target tokens "
            "that are the likeliest; entropy, the mean of the predictions', in nats.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    compute_metrics: str | None = field(
        default=None,
        metadata=flag(
            "A function of yours, `package.module:function`, that makes further metrics of an evaluation, as "
            "transformers' compute_metrics does: from an EvalPrediction to a dict of numbers. Its predictions are the "
            "likeliest tokens, not logits.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    load_best_model_at_end: bool = field(
        default=False,
        metadata=flag(
            "Save the model of the checkpoint that is best by --metric_for_best_model (or the last step's, if that is "
            "the best) instead of the last. --save_steps must be a multiple of --eval_steps. --save_total_limit never "
            "removes the best checkpoint.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata=flag(
            "What models are compared by, as metrics.jsonl names it, with or without eval_ before it: by default the "
            "loss. With several --eval_file it must be named.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata=flag(
            "Whether the better model has the greater --metric_for_best_model. By default so, but for losses and "
            "perplexities.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=flag(
            "Finish the run early when this many evaluations in a row have not improved --metric_for_best_model. By "
            "default it makes all its steps. --load_best_model_at_end then saves the best model.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata=flag(
            "How much the metric must improve on the best so far for --early_stopping_patience to count anew.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        files: object = self.eval_file
        if isinstance(files, dict):  # From a YAML file, or Python.
            object.__setattr__(self, "eval_file", [f"{name}={path}" for name, path in files.items()])
        elif isinstance(files, str):
            object.__setattr__(self, "eval_file", [files])
        if self.eval_file in (["None"], ["null"]):  # What a script writes for what it does not give.
            object.__setattr__(self, "eval_file", None)
        expand_home(self)
        check_types(self)
        self._check_files()
        sources = ("eval_file", "eval_split_size", "dataset_test_split")
        given = [f"--{name}" for name in sources if getattr(self, name) is not None]
        if len(given) > 1:
            raise LoptError(f"give one of {' and '.join(given)}: a run is evaluated on the rows of one")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) < least:
                raise LoptError(f"--{name} {value:g}: at least {least}")
        size = self.eval_split_size
        if size is not None and (size <= 0 or (size >= 1 and size != int(size))):
            raise LoptError(
                f"--eval_split_size {size:g}: a number of rows such as 100, or a share of them such as 0.05"
            )
        if self.load_best_model_at_end and not given:
            raise LoptError("--load_best_model_at_end needs rows to compare models on: give --eval_file")
        if unknown := [name for name in self.eval_metrics or [] if name not in TOKEN_METRICS]:
            raise LoptError(f"--eval_metrics {unknown[0]}: give {' or '.join(TOKEN_METRICS)}, or both")
        for name in _NEED_ROWS:
            if getattr(self, name) not in (None, False) and not given:
                raise LoptError(
                    f"--{name} needs rows to evaluate on: give --eval_file, --eval_split_size or --dataset_test_split"
                )
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise LoptError(f"--early_stopping_patience {self.early_stopping_patience}: at least 1")
            if self.eval_steps == 0 and self.eval_strategy == "steps":
                raise LoptError("--early_stopping_patience needs evaluations before the last: --eval_steps above 0")
        if self.eval_strategy == "epoch" and not given:
            raise LoptError("--eval_strategy epoch needs rows to evaluate on: give --eval_file or --eval_split_size")

    def _check_files(self) -> None:
        files = self.eval_file or []
        if not files and self.eval_file is not None:
            raise LoptError("--eval_file: give a file, or several with a name each: easy=easy.jsonl hard=hard.jsonl")
        if empty := [file for file in files if re.fullmatch(r"[A-Za-z]\w*=", file)]:
            raise LoptError(f"--eval_file {empty[0]}: it names no file; give {empty[0]}FILE, or leave it out")
        names = [name for file in files if (name := named_file(file)[0])]
        if len(files) > 1 and len(names) < len(files):
            nameless = next(file for file in files if not named_file(file)[0])
            raise LoptError(
                f"--eval_file {nameless}: with several files each has a name (a letter, then letters, digits and _): "
                f"easy={nameless}"
            )
        for name in names:
            if names.count(name) > 1:
                raise LoptError(f"--eval_file: two of the files have the name {name}")

    @property
    def eval_files(self) -> dict[str, str]:
        """The files of `eval_file` by the names of their sets; the only one's may be empty."""
        return {name: os.path.expanduser(path) for name, path in map(named_file, self.eval_file or [])}

    @property
    def chooses(self) -> bool:
        """Whether the result of a run depends on what evaluations measure."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def every(self, steps_per_epoch: int) -> int:
        """Steps between evaluations; 0 for the last step only."""
        return steps_per_epoch if self.eval_strategy == "epoch" else self.eval_steps

    def first_step(self, steps_per_epoch: int) -> int:
        """The steps that are done before the first evaluation, but for one of the start or of the last step."""
        return math.ceil(self.eval_delay * (steps_per_epoch if self.eval_strategy == "epoch" else 1))

    def is_due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether an evaluation is due when `step` steps are done, besides those of the start and the last step."""
        every, first = self.every(steps_per_epoch), self.first_step(steps_per_epoch)
        return every > 0 and step % every == 0 and step >= first

    def check_checkpoints(self, checkpoint: CheckpointConfig) -> None:
        """Sees that the best model can be had at the end.

        Raises:
            LoptError: some checkpoint would not be evaluated.
        """
        if checkpoint.only_best:  # Every evaluated step that is the best is saved.
            if (self.eval_file, self.eval_split_size, self.dataset_test_split) == (None, None, None):
                raise LoptError("--save_strategy best needs rows to evaluate on: give --eval_file or --eval_split_size")
            if self.eval_strategy == "steps" and self.eval_steps == 0:
                raise LoptError("--save_strategy best needs evaluations before the last: --eval_steps above 0")
            return
        if not self.load_best_model_at_end:
            return
        every, save_steps = "--load_best_model_at_end evaluates every checkpoint, so", checkpoint.save_steps
        if self.eval_strategy != checkpoint.save_strategy:
            strategies = f"{self.eval_strategy} and {checkpoint.save_strategy}"
            raise LoptError(f"{every} --eval_strategy and --save_strategy must be the same; they are {strategies}")
        if self.eval_strategy == "steps" and (not save_steps or not self.eval_steps or save_steps % self.eval_steps):
            raise LoptError(
                f"{every} --save_steps must be a multiple of --eval_steps; they are {save_steps} and {self.eval_steps}"
            )

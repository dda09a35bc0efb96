"""Flags that are given and can have no effect: an error where somebody would be misled, else a warning."""

from collections.abc import Set
from pathlib import Path

from lopt_pp.config.objective import ALL, LOCAL_RATES
from lopt_pp.config.train_config import DEFAULTS, Config
from lopt_pp.errors import LoptError

_HELD_OUT = "--eval_file, --eval_split_size or --dataset_test_split"

_OF_HEADS = ("local_learning_rate", "local_head_learning_rate", "local_head_warmup_steps", "local_accumulation_steps")
"""Flags of all local objectives."""

_OF_ONE = {
    "reconstruction_weight": "reconstruction",
    "auxiliary_layers": "next_token",
    "auxiliary_choice": "next_token",
}
"""Flags of one local objective. A class of the user's own may read them, too."""


def check_effects(config: Config, given: Set[str], eval_strategy: str | None = None) -> list[str]:
    """Looks for flags that can have no effect with the others.

    Args:
        config: all flags.
        given: the names of those that are given, rather than left at their defaults.
        eval_strategy: of TRL, `steps` or `no`, where it is given.

    Returns:
        A line for each that does no harm.

    Raises:
        LoptError: one would mislead: rows that are not left out, a timeline or an evaluation that never comes.
    """
    _check_evaluation(config, given, eval_strategy)
    _check_data(config, given)
    steps = config.run.max_steps
    for name, window in config.report.windows.items():
        if 0 < steps < window[0]:
            raise LoptError(f"--{name} {window[0]}-{window[-1]}: the run has {steps} steps")
    return [*_unused_local_flags(config, given), *_unused_flags(config, given)]


def _check_evaluation(config: Config, given: Set[str], eval_strategy: str | None) -> None:
    evaluation = config.evaluation
    sources = (evaluation.eval_file, evaluation.eval_split_size, evaluation.dataset_test_split)
    has_rows = any(source is not None for source in sources)
    if eval_strategy == "no" and has_rows:
        raise LoptError(f"--eval_strategy no, and rows to evaluate on are given: leave out {_HELD_OUT}")
    if eval_strategy == "steps" and not has_rows:
        raise LoptError(f"--eval_strategy steps needs rows to evaluate on: give {_HELD_OUT}")
    if eval_strategy == "steps" and "eval_steps" not in given:
        raise LoptError("--eval_strategy steps: give --eval_steps as well, for which TRL takes --logging_steps")
    # Without an evaluation, a recipe may say that there is none.
    if "eval_steps" in given and evaluation.eval_steps and not has_rows and eval_strategy != "no":
        raise LoptError(f"--eval_steps {evaluation.eval_steps} needs rows to evaluate on: give {_HELD_OUT}")


def _check_data(config: Config, given: Set[str]) -> None:
    data = config.data
    for name in ("dataset_config", "dataset_split"):
        value = getattr(data, name)
        if data.train_file and name in given and value not in (None, "train"):
            raise LoptError(f"--{name} {value} is of --dataset_name, and the rows are those of --train_file")


def _unused_local_flags(config: Config, given: Set[str]) -> list[str]:
    objective, num_stages = config.objective, config.pipeline.num_stages
    where = f"--method {objective.method}" if objective.method != "lopt" else f"--local_objective {objective.local}"
    if num_stages == 1:
        where = "--num_stages 1"
    has_heads = num_stages > 1 and objective.local != "none"
    unused = [] if has_heads else [name for name in (*_OF_HEADS, *_OF_ONE, "max_interface_drift") if name in given]
    if has_heads and objective.local in LOCAL_RATES:
        unused += [name for name, local in _OF_ONE.items() if name in given and local != objective.local]
    if has_heads and {"auxiliary_layers", "auxiliary_choice"} <= given and objective.auxiliary_choice != "even":
        unused += ["auxiliary_layers"] if objective.auxiliary_choice == ALL or objective.chosen_layers else []
    lines = []
    if names := [f"--{name}" for name in dict.fromkeys(unused) if config.flags()[name] != DEFAULTS[name]]:
        lines.append(f"of no effect with {where}: {', '.join(names)}")
    warmup, steps = objective.local_head_warmup_steps, config.run.max_steps
    if has_heads and 0 < steps <= warmup:
        lines.append(
            f"--local_head_warmup_steps {warmup}: the run has {steps} steps, so the blocks before the last never learn"
        )
    return lines


def _unused_flags(config: Config, given: Set[str]) -> list[str]:
    """Lines on flags of which the run would be the same without them."""
    lines = []
    checkpoint, report, model = config.checkpoint, config.report, config.model
    if config.pipeline.num_stages == 1 and "probe_steps" in given and report.probe_steps:
        lines.append(f"of no effect with --num_stages 1: --probe_steps {report.probe_steps}; there is no boundary")
    if checkpoint.save_total_limit is not None and not checkpoint.saves:
        lines.append(f"of no effect with --save_steps 0: --save_total_limit {checkpoint.save_total_limit}")
    if report.report_to in (None, ["none"]):
        names = ("logging_dir", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
        unused = [f"--{name} {value}" for name in names if (value := getattr(report, name)) is not None]
        lines += [f"of no effect without --report_to: {', '.join(unused)}"] if unused else []
    if config.optim.optim.startswith("schedule_free") and not config.optim.lr_scheduler_type.startswith("constant"):
        lines.append(
            f"--optim {config.optim.optim} averages weights instead of lowering the rate: it is meant for "
            f"--lr_scheduler_type constant, and the rate is {config.optim.lr_scheduler_type}"
        )
    if config.optim.lr_scheduler_type != "constant" and 0 < config.run.max_steps <= config.optim.warmup_steps:
        warmup, steps = config.optim.warmup_steps, config.run.max_steps
        lines.append(f"--warmup_steps {warmup}: the run has {steps} steps, so no rate comes to its peak")
    if config.optim.lr_scheduler_type == "constant" and (config.optim.warmup_steps or config.optim.warmup_ratio):
        lines.append("--lr_scheduler_type constant has no warm-up; constant_with_warmup has")
    if model.model_revision != "main" and Path(model.model_name_or_path).is_dir():
        lines.append(f"of no effect on a local directory: --model_revision {model.model_revision}")
    if model.resize_to_multiple_of is not None and not model.added_tokens:
        lines.append(f"of no effect without --added_tokens: --resize_to_multiple_of {model.resize_to_multiple_of}")
    if model.added_tokens and not config.objective.train_embeddings:
        lines.append("--train_embeddings false: the input embeddings of --added_tokens stay as they are drawn")
    if config.data.packing_strategy != "bfd" and not config.data.packing:
        lines.append(f"of no effect without --packing: --packing_strategy {config.data.packing_strategy}")
    if config.data.truncation_mode is not None and config.data.splits_rows:
        strategy = config.data.packing_strategy
        lines.append(
            f"of no effect with --packing_strategy {strategy}, which splits long rows: --truncation_mode "
            f"{config.data.truncation_mode}"
        )
    if config.data.streaming and config.data.dataset_num_proc is not None:
        lines.append("of no effect with --streaming: --dataset_num_proc")
    return lines

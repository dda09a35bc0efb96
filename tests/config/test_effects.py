"""Flags that are given and can have no effect."""

import pytest

from lopt_pp.config.parser import parse_config
from lopt_pp.errors import LoptError

REQUIRED = ["--model_name_or_path", "a-model", "--output_dir", "out"]


def warnings_of(line: str) -> list[str]:
    words, warnings = line.split(), list[str]()
    data = [] if "--dataset_name" in words else ["--train_file", "rows.jsonl"]
    parse_config([*REQUIRED, *data, *words], warn=warnings.append)
    return warnings


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--eval_steps 100", "^--eval_steps 100 needs rows to evaluate on: give --eval_file, --eval_split_size or"),
        ("--eval_steps 500", "^--eval_steps 500 needs rows"),
        ("--trace 11-14 --max_steps 10", "^--trace 11-14: the run has 10 steps$"),
        ("--profile_steps 11-14 --max_steps 10", "^--profile_steps 11-14: the run has 10 steps$"),
        ("--profile_steps 14", "^--profile_steps 14: the first and the last step, counted from 1"),
        ("--dataset_split train[:100]", r"^--dataset_split train\[:100\] is of --dataset_name, and the rows are those"),
        ("--dataset_config main", "^--dataset_config main is of --dataset_name"),
    ],
)
def test_what_would_mislead_is_an_error(line: str, error: str) -> None:
    with pytest.raises(LoptError, match=error):
        warnings_of(line)


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("--method frozen --local_learning_rate 1e-6", "of no effect with --method frozen: --local_learning_rate"),
        (
            "--method e2e --reconstruction_weight 5 --local_head_warmup_steps 3",
            "of no effect with --method e2e: --local_head_warmup_steps, --reconstruction_weight",
        ),
        ("--local_objective none --local_learning_rate 1e-6", "of no effect with --local_objective none: --local_l"),
        ("--num_stages 1 --local_learning_rate 1e-6", "of no effect with --num_stages 1: --local_learning_rate"),
        ("--auxiliary_layers 4", "of no effect with --local_objective reconstruction: --auxiliary_layers"),
        ("--local_objective next_token --reconstruction_weight 5", "of no effect with --local_objective next_token: "),
        ("--num_stages 1 --probe_steps 5", "of no effect with --num_stages 1: --probe_steps 5; there is no boundary"),
        ("--save_steps 0 --save_total_limit 2", "of no effect with --save_steps 0: --save_total_limit 2"),
        ("--logging_dir runs", "of no effect without --report_to: --logging_dir runs"),
        ("--lr_scheduler_type constant --warmup_steps 3", "--lr_scheduler_type constant has no warm-up; constant_with"),
        ("--model_name_or_path . --model_revision v1", "of no effect on a local directory: --model_revision v1"),
        ("--warmup_steps 20 --max_steps 20", "--warmup_steps 20: the run has 20 steps, so no rate comes to its peak"),
        ("--streaming --dataset_num_proc 2", "of no effect with --streaming: --dataset_num_proc"),
        ("--packing_strategy wrapped", "of no effect without --packing: --packing_strategy wrapped"),
        (
            "--packing --packing_strategy wrapped --truncation_mode keep_end",
            "of no effect with --packing_strategy wrapped, which splits long rows: --truncation_mode keep_end",
        ),
        ("--resize_to_multiple_of 64", "of no effect without --added_tokens: --resize_to_multiple_of 64"),
        ("--train_embeddings false --added_tokens <x>", "--train_embeddings false: the input embeddings of --added"),
        (
            "--local_head_warmup_steps 9 --max_steps 9",
            "--local_head_warmup_steps 9: the run has 9 steps, so the blocks before the last never learn",
        ),
    ],
)
def test_what_does_no_harm_is_a_warning(line: str, warning: str) -> None:
    (said,) = warnings_of(line)
    assert said.startswith(warning)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--eval_steps 0",
        "--eval_steps 100 --eval_split_size 5",
        "--eval_steps 100 --eval_strategy no",
        "--trace 11-14 --max_steps 11",
        "--trace 11-14",
        "--dataset_split train",
        "--dataset_name d --dataset_split test --dataset_config main",
        "--method frozen --reconstruction_weight 10 --auxiliary_layers 2",
        "--local_objective own:Objective --reconstruction_weight 5 --auxiliary_layers 4",
        "--local_objective next_token --auxiliary_layers 4 --auxiliary_choice even",
        "--num_stages 1 --probe_steps 0",
        "--save_steps 0",
    ],
)
def test_flags_that_have_one_are_silent(line: str) -> None:
    assert warnings_of(line) == []

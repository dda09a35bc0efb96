"""Flags of TRL on the command line and in a file, together with ours."""

from pathlib import Path

import pytest

from lopt_pp.config.parser import parse_config
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError

REQUIRED = ["--model_name_or_path", "a-model", "--train_file", "rows.jsonl", "--output_dir", "out"]


def parse(line: str, warnings: list[str] | None = None) -> Config:
    said = [] if warnings is None else warnings
    return parse_config([*REQUIRED, *line.split()], warn=said.append)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--bf16", "--dtype bfloat16"),
        ("--bf16=true --fp16 false", "--dtype bfloat16"),
        ("--bf16 --dtype bfloat16", "--dtype bfloat16"),
        ("--bf16 False", ""),
        ("--seed 4 --bf16 --packing", "--seed 4 --packing --dtype bfloat16"),
        ("--save-strategy no", "--save_steps 0"),
        ("--save_strategy no --save_steps 0", "--save_steps 0"),
        ("--save_strategy steps --save_steps 7", "--save_steps 7"),
        ("--eval_strategy steps --eval_steps 5 --eval_file e.jsonl", "--eval_steps 5 --eval_file e.jsonl"),
        ("--eval_strategy no", ""),
        ("--warmup_steps 0.1 --max_seq_length 99", "--warmup_ratio 0.1 --max_length 99"),
        ("--no_gradient_checkpointing", "--gradient_checkpointing false"),
        ("--no_remove_unused_columns --no-dataloader_pin_memory", ""),
        ("--local_rank -1 --lora_target_modules", ""),
        ("--use_cpu --ddp_timeout 60", "--backend gloo --stream_timeout 60"),
        ("--train_sampling_strategy sequential", "--no_shuffle_dataset"),
        ("--report_to tensorboard --push_to_hub false --deepspeed none", "--report_to tensorboard"),
    ],
)
def test_command_lines(theirs: str, ours: str) -> None:
    if "lora_target_modules" in theirs:
        with pytest.raises(LoptError, match="^--lora_target_modules: all weights"):
            parse(theirs)
        theirs = theirs.replace("--lora_target_modules", "")
    assert parse(theirs) == parse(ours)


def test_a_file_means_the_same_as_a_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "bf16: true\nfp16: null\nsave_strategy: no\ntorch_dtype:\nreport_to:\n- tensorboard\ndo_train: true\n"
        "gradient_checkpointing_kwargs:\n  use_reentrant: false\neval_strategy: no\nlearning_rate: 1.0e-04\n"
    )
    expected = parse("--dtype bfloat16 --save_steps 0 --report_to tensorboard --learning_rate 1e-4")
    assert parse(f"--config {file}") == expected
    assert parse(f"--config {file} --dtype float32").stage.dtype == "float32", "the command line wins"
    assert parse(f"--config {file} --bf16 false").stage.dtype == "float32"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("--bf16 --dtype float32", r"^--bf16 and --dtype are one flag here, and differ \(bfloat16 against float32\)"),
        ("--save_steps 5 --save_strategy no", r"^--save_steps and --save_strategy are one flag here, and differ"),
        ("--lr 1e-4", "^unknown flag --lr; it is --learning_rate here$"),
        ("--batch-size=4", "^unknown flag --batch_size; it is --per_device_train_batch_size here$"),
        ("--eval_strategy epoch", "^--eval_strategy epoch needs rows to evaluate on"),
        ("--report_to tensorboard wandby", "^--report_to 'wandby': expected one or several of none, all, tensorboard"),
        ("--save_strategy bests", r"^--save_strategy: invalid choice: 'bests' \(choose from no, steps, epoch, best\)$"),
        ("--evaluation_strategy epochs", r"^--evaluation_strategy: invalid choice: 'epochs' \(choose from no, steps, "),
        ("--eval_strategy no --eval_file e", "^--eval_strategy no, and rows to evaluate on are given"),
        ("--eval_strategy steps --eval_steps 5", "^--eval_strategy steps needs rows to evaluate on"),
        ("--evaluation_strategy steps --eval_file e", "^--eval_strategy steps: give --eval_steps as well"),
    ],
)
def test_unusable_command_lines(line: str, error: str) -> None:
    with pytest.raises(LoptError, match=error):
        parse(line)


def test_a_hint_comes_before_what_is_missing() -> None:
    with pytest.raises(LoptError, match="^unknown flag --model; it is --model_name_or_path here$"):
        parse_config(["--model", "m"])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("epochs: 3", "run.yaml: unknown flag epochs; it is --num_train_epochs here$"),
        ("use_peft: true\nlora_r: 8", "run.yaml: --use_peft: all weights"),
        ("max_length: null", "run.yaml: --max_length None: rows need a longest length"),
        ("bf16: true\ndtype: float32", "run.yaml: --bf16 and --dtype are one flag here"),
        (
            "logging_strategy: epochs",
            r"run.yaml: --logging_strategy: invalid choice: 'epochs' \(choose from no, steps, ",
        ),
        ("save_strategy: best", "^--save_strategy best needs rows to evaluate on"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str, error: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(LoptError, match=error):
        parse(f"--config {tmp_path / 'run.yaml'}")


def test_what_has_no_effect_is_named_once(tmp_path: Path) -> None:
    warnings: list[str] = []
    parse("--dataloader_num_workers 4 --use_liger_kernel --log_on_each_node false --fp16 no", warnings)
    assert warnings == ["of no effect here: --dataloader_num_workers, --use_liger_kernel (docs/trl.md)"]

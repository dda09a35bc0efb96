"""Flags and the YAML file: what is read, what wins, and what is said about mistakes."""

import dataclasses
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from flags import FLAGS
from launching import environment

from lopt_pp import cli
from lopt_pp.config.parser import parse_config
from lopt_pp.config.train_config import SECRETS, Config
from lopt_pp.errors import LoptError

REQUIRED = ["--model_name_or_path", "a-model", "--train_file", "rows.jsonl", "--output_dir", "out"]


def parse(*flags: str) -> Config:
    return parse_config([*REQUIRED, *flags])


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def test_defaults() -> None:
    flags = parse().flags()
    assert flags == {name: field.default for name, field in FLAGS.items() if name not in SECRETS} | {
        "model_name_or_path": "a-model",
        "train_file": ["rows.jsonl"],
        "output_dir": "out",
    }
    assert (flags["num_stages"], flags["queue_depth"], flags["reconstruction_weight"]) == (2, 2, 10.0)


def test_values_arrive_with_their_types() -> None:
    config = parse(
        "--num_stages", "4", "--learning_rate=1e-4", "--lr_scheduler_type", "cosine", "--attn_implementation", "eager"
    )
    assert config.pipeline.num_stages == 4
    assert config.optim.learning_rate == 1e-4
    assert config.optim.lr_scheduler_type == config.flags()["lr_scheduler_type"] == "cosine"
    assert config.model.attn_implementation == "eager"


@pytest.mark.parametrize(
    ("flags", "shuffle", "overwrite"),
    [
        ("", True, False),
        ("--shuffle_dataset false", False, False),
        ("--shuffle_dataset=False --overwrite_output_dir True", False, True),
        ("--overwrite_output_dir", True, True),
        ("--no_shuffle_dataset --overwrite_output_dir no", False, False),
    ],
)
def test_booleans(flags: str, shuffle: bool, overwrite: bool) -> None:
    config = parse(*flags.split())
    assert config.data.shuffle_dataset is shuffle
    assert config.run.overwrite_output_dir is overwrite


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--lerning_rate 1", r"^unknown flag --lerning_rate; did you mean --learning_rate\?$"),
        ("--queue_dept=3", r"^unknown flag --queue_dept=3; did you mean --queue_depth\?$"),
        ("--num_stage 4", r"^unknown flag --num_stage; did you mean --num_stages\?$"),
        ("--zzz", "^unknown flag --zzz; see --help$"),
        ("seed=4", r"^unknown flag seed=4; did you mean --seed\?$"),
        ("-lr 1", "^unknown flag -lr; it is --learning_rate here$"),
        ("oddity", "^unknown flag oddity; see --help$"),
        ("--max_steps ten", "^--max_steps.* invalid int value: 'ten'"),
        ("--max_steps 1.5", "^--max_steps.* invalid int value: '1.5'"),
        ("--learning_rate fast", "^--learning_rate.* invalid float value: 'fast'"),
        ("--shuffle_dataset maybe", "^--shuffle_dataset.*got maybe"),
        ("--backend mpi", "^--backend: invalid choice: 'mpi' .*auto.*nccl.*gloo"),
        ("--data_parallel none --max_steps none", "^--max_steps.* invalid int value: 'none'"),
        ("--dtype float16", "^--dtype: invalid choice: 'float16' .*float32.*bfloat16"),
        ("--lr_scheduler_type triangle", "^--lr_scheduler_type.*invalid choice: 'triangle' .*linear.*cosine"),
        ("--max_steps", "^--max_steps.*expected one argument"),
        ("--config", "^--config: give the path of a YAML file, once$"),
        ("--learning_rate nan", "^--learning_rate nan: expected a finite number$"),
        ("--num_train_epochs inf", "^--num_train_epochs inf: expected a finite number$"),
        ("--per_device_train_batch_size 0", "^--per_device_train_batch_size 0: at least 1$"),
        ("--gradient_accumulation_steps 0", "^--gradient_accumulation_steps 0: at least 1$"),
        ("--logging_steps 0", "^--logging_steps 0: at least 1$"),
        ("--train_file=", "^--train_file '': expected a string that is not empty"),
        ("--seed -1", "^--seed -1: at least 0$"),
        ("--num_train_epochs 0", "^--max_steps or --num_train_epochs must be above 0$"),
        ("--reconstruction_weight -1", "^--reconstruction_weight -1.0: at least 0$"),
        ("--dataset_name hub/data", "^give exactly one of --train_file and --dataset_name; both are given$"),
    ],
)
def test_unusable_flags(flags: str, error: str) -> None:
    with pytest.raises(LoptError, match=error):
        parse(*flags.split())


def test_required_flags_are_named() -> None:
    with pytest.raises(LoptError, match="required: --model_name_or_path.*--output_dir"):
        parse_config([])
    with pytest.raises(LoptError, match="exactly one of --train_file and --dataset_name; neither"):
        parse_config(["--model_name_or_path", "a-model", "--output_dir", "out"])


def test_a_yaml_file_after_flags_is_not_taken_for_missing_flags() -> None:
    with pytest.raises(LoptError, match="^run.yaml: a YAML file comes first, or after --config: lopt-pp train"):
        parse_config(["--num_stages", "2", "run.yaml"])
    with pytest.raises(LoptError, match="required: --model_name_or_path"):
        parse_config(["--train_file", "rows.yaml"])


def test_a_yaml_file_may_hold_everything(tmp_path: Path) -> None:
    content = """\
        model_name_or_path: a-model
        train_file: rows.jsonl
        output_dir: out
        learning_rate: 3e-5
        max_steps: 7
        shuffle_dataset: false
        lr_scheduler_type: cosine
        attn_implementation:
    """
    config = parse_config(["--config", write(tmp_path / "run.yaml", content)])
    expected = parse(
        *["--learning_rate", "3e-5", "--max_steps", "7", "--shuffle_dataset", "false", "--lr_scheduler_type", "cosine"],
    )
    assert config == expected


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
@pytest.mark.parametrize("file_first", [True, False])
def test_the_command_line_wins_over_the_file(tmp_path: Path, form: str, file_first: bool) -> None:
    file = form.format(write(tmp_path / "run.yaml", "max_steps: 7\nqueue_depth: 5\nshuffle_dataset: true\n")).split()
    flags = ["--max_steps", "9", "--shuffle_dataset", "false"]
    config = parse(*file, *flags) if file_first else parse(*flags, *file)
    assert (config.run.max_steps, config.pipeline.queue_depth, config.data.shuffle_dataset) == (9, 5, False)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("max_steps: [1", "^--config .*run.yaml is not YAML: while parsing .*line 1"),
        (
            "max_steps: 1\n seed: 2",
            "^--config .*run.yaml is not YAML: mapping values are not allowed here, line 2",
        ),
        ("- max_steps", r"^--config .*run.yaml: expected lines of the form 'flag: value'$"),
        ("", r"^--config .*run.yaml: expected lines of the form 'flag: value'$"),
        ("1: 2", r"^--config .*run.yaml: expected lines of the form 'flag: value'$"),
        ("lerning_rate: 1", r"^.*run.yaml: unknown flag lerning_rate; did you mean --learning_rate\?$"),
        ("config: other.yaml", "^.*run.yaml: unknown flag config"),
        ("help: true", "^.*run.yaml: unknown flag help"),
        ("env: 3", "^.*run.yaml: env: expected lines of the form 'NAME: value' below it$"),
        ("max_steps: seven", "^--max_steps.* invalid int value: 'seven'"),
        ("max_steps: 7.5", "^--max_steps 7.5: of the wrong type; expected a whole number$"),
        ("max_steps: true", "^--max_steps True: of the wrong type; expected a whole number$"),
        ("learning_rate: [1]", r"^--learning_rate \[1\]: of the wrong type; expected a number$"),
        ("shuffle_dataset: 1", "^--shuffle_dataset 1: of the wrong type; expected true or false$"),
        ("dataset_split: 5", "^--dataset_split 5: of the wrong type; expected a string, such as '5' in quotes$"),
        ("train_file: 5", "^--train_file 5: of the wrong type; expected a list, each a string or nothing$"),
        ("train_file: ''", "^--train_file '': expected a string that is not empty"),
        ("train_file: [a, '']", r"^--train_file \['a', ''\]: expected strings that are not empty"),
        ("train_metrics: perplexity", "^--train_metrics perplexity: give mean_token_accuracy or entropy"),
        ("backend: mpi", r"^--backend: invalid choice: 'mpi' \(choose from auto, nccl, gloo\)$"),
        ("lr_scheduler_type: triangle", "^--lr_scheduler_type 'triangle': .*not a valid"),
        ("lr_scheduler_type: 5", "^--lr_scheduler_type 5: of the wrong type; expected SchedulerType$"),
        (
            "shuffle_dataset: perhaps",
            "^--shuffle_dataset.*: Truthy value expected: got perhaps but expected one of yes/no",
        ),
        ("packing: 'no'\nseed: '-3'", "^--seed -3: at least 0$"),
        ("seed: -1\nlerning_rate: 1", "unknown flag lerning_rate"),
        ("learning_rate: .nan", "^--learning_rate nan: expected a finite number$"),
        ("queue_depth: 0", "^--queue_depth 0: at least 1$"),
    ],
)
def test_unusable_files(tmp_path: Path, content: str, error: str) -> None:
    file = write(tmp_path / "run.yaml", content)
    flags = ["--model_name_or_path", "a-model", "--output_dir", "out"]
    data = [] if content.startswith("train_file") else ["--train_file", "rows.jsonl"]
    with pytest.raises(LoptError, match=error):
        parse_config([*flags, *data, "--config", file])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LoptError, match=r"^--config .*gone.yaml does not exist$"):
        parse("--config", str(tmp_path / "gone.yaml"))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoptError, match=r"^--config .*run.yaml: .*can't decode"):
        parse("--config", str(tmp_path / "run.yaml"))


def test_help_shows_each_flag_once_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    entries = re.split(r"^  (?=-)", text, flags=re.MULTILINE)[1:]
    shown = {entry.split()[0].removeprefix("--"): " ".join(entry.split()) for entry in entries}
    assert len(shown) == len(entries)
    assert shown.keys() == {*FLAGS, "nproc", "max_restarts", "-h,"}
    for name, field in FLAGS.items():
        default = field.default
        if default is dataclasses.MISSING:
            assert "Required." in shown[name]
        elif default is not None:
            assert f"(default: {getattr(default, 'value', default)})" in shown[name]
        assert len(shown[name].split()) > 5, f"--{name} is not explained"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == version("lopt-pp") + "\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["fly"])
    assert left.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert cli.main(["train", *REQUIRED, "--lerning_rate", "1"]) == 2
    assert capsys.readouterr().err == "lopt-pp: error: unknown flag --lerning_rate; did you mean --learning_rate?\n"


def test_of_several_processes_one_prints_the_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["train", *REQUIRED, "--lerning_rate", "1"]) == 2
    assert capsys.readouterr().err == ""


def test_more_processes_than_stages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["train", *REQUIRED]) == 2
    assert "3 processes do not fit --num_stages 2" in capsys.readouterr().err


def test_the_command_does_not_wait_for_torch() -> None:
    code = "import sys, lopt_pp.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0

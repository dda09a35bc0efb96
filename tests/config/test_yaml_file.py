"""A YAML file means what it looks like, and paths begin at home."""

import os
from pathlib import Path
from unittest import mock

import pytest
from flags import FLAGS

from lopt_pp.config.data import DataConfig
from lopt_pp.config.parser import load_config, parse_config
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError

REQUIRED = {"model_name_or_path": "a-model", "train_file": "rows.jsonl", "output_dir": "out"}


def parse(folder: Path, content: str, *flags: str) -> Config:
    path = folder / "run.yaml"
    given = "".join(f"{name}: {value}\n" for name, value in REQUIRED.items() if f"{name}:" not in content)
    path.write_text(given + content)
    return parse_config(["--config", str(path), *flags])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("max_steps: 010", {"max_steps": 10}),
        ("max_steps: 0010\nseed: 007", {"max_steps": 10, "seed": 7}),
        ("max_steps: 1_000", {"max_steps": 1000}),
        ("learning_rate: 1e-5", {"learning_rate": 1e-5}),
        ("learning_rate: 1.e-5\nweight_decay: .1", {"learning_rate": 1e-5, "weight_decay": 0.1}),
        ("num_train_epochs: 03", {"num_train_epochs": 3.0}),
        ("packing: yes\nshuffle_dataset: Off", {"packing": True, "shuffle_dataset": False}),
        ("run_name: 2024-01-01", {"run_name": "2024-01-01"}),
        ("run_name: 1:30", {"run_name": "1:30"}),
        ("run_name: no\nmodel_revision: 010", {"run_name": "no", "model_revision": "010"}),
        ("model_revision: 1234e56", {"model_revision": "1234e56"}),
        ("max_steps: ~\nseed: null\ndtype:\nrun_name: None", {}),
        ("max_steps: None\nsave_total_limit: None", {}),
    ],
)
def test_words_that_yaml_makes_something_else_of(tmp_path: Path, content: str, expected: dict[str, object]) -> None:
    plain = parse(tmp_path, "").flags()
    assert parse(tmp_path, content).flags() == plain | expected


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("max_steps: 1:30", "^--max_steps.* invalid int value: '1:30'$"),
        ("max_steps: 0x10", "^--max_steps.* invalid int value: '0x10'$"),
        ("max_steps: 0o17", "^--max_steps.* invalid int value: '0o17'$"),
        ("max_steps: 2024-01-01", "^--max_steps.* invalid int value: '2024-01-01'$"),
        ("output_dir: ~", "required: --output_dir"),
        ("output_dir: None", "required: --output_dir"),
        ("seed: 1\nmax_steps: 5\nseed: 2", r"^--config .*run.yaml, line 6: 'seed' is given in line 4 already$"),
        ("env:\n  A: 1\n  A: 2", r"^--config .*run.yaml, line 6: env: 'A' is given in line 5 already$"),
        ("env:\n  A:", "^--config .*run.yaml: env: 'A' has no value; '' is an empty one$"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: str, error: str) -> None:
    with pytest.raises(LoptError, match=error):
        parse(tmp_path, content)


def test_keys_that_are_merged_in_may_be_given_anew(tmp_path: Path) -> None:
    content = "env: &env {A: a, B: b}\n<<: {seed: 1, max_steps: 5}\nseed: 2"
    with mock.patch.dict(os.environ):
        config = parse(tmp_path, content)
    assert (config.run.seed, config.run.max_steps) == (2, 5)


def test_the_environment_is_what_is_written(tmp_path: Path) -> None:
    written = {"A": "on", "B": "0010", "C": "true", "D": "''", "E": "~/cache", "F": "1e3", "G": "'None'"}
    with mock.patch.dict(os.environ, {"HOME": "/home/me"}):
        parse(tmp_path, "env:\n" + "".join(f"  {name}: {value}\n" for name, value in written.items()))
        seen = {name: os.environ[name] for name in written}
    assert seen == written | {"D": "", "E": "/home/me/cache", "G": "None"}


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(LoptError, match="^--config .* is a directory; give a YAML file$"):
        parse_config(["--config", str(tmp_path)])


PATHS = ["model_name_or_path", "train_file", "dataset_name", "chat_template_path", "eval_file", "output_dir"]
PATHS += ["resume_from_checkpoint", "logging_dir"]


def test_these_are_the_flags_with_paths() -> None:
    assert {name for name, field in FLAGS.items() if field.metadata["is_path"]} == set(PATHS)


@pytest.mark.parametrize("name", PATHS)
def test_paths_begin_at_home(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file, on the command line behind an equals sign, and from Python."""
    monkeypatch.setenv("HOME", "/home/me")
    more = {"report_to": "tensorboard"} if name == "logging_dir" else {}
    flags = {key: value for key, value in (REQUIRED | more).items() if (key, name) != ("train_file", "dataset_name")}
    expected = ["/home/me/x"] if name in ("train_file", "eval_file") else "/home/me/x"
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in (flags | {name: "~/x"}).items()))
    words = [f"--{key}={value}" for key, value in (flags | {name: "~/x"}).items()]
    for config in (parse_config(["--config", str(path)]), parse_config(words), load_config(**flags | {name: "~/x"})):
        assert config.flags()[name] == expected


def test_evaluation_sets_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mapping in a file or from Python, and with an equals sign on the command line."""
    monkeypatch.setenv("HOME", "/home/me")
    sets = {"easy": "easy.jsonl", "hard": "~/a=b.jsonl"}
    path = tmp_path / "run.yaml"
    lines = [f"{name}: {value}" for name, value in REQUIRED.items()]
    path.write_text("\n".join([*lines, "eval_file:", *(f"  {name}: {file}" for name, file in sets.items())]))
    words = [f"--{name}={value}" for name, value in REQUIRED.items()]
    on_line = parse_config([*words, "--eval_file", *(f"{name}={file}" for name, file in sets.items())])
    for config in (on_line, parse_config(["--config", str(path)]), load_config(**REQUIRED, eval_file=sets)):
        assert config.evaluation.eval_files == {"easy": "easy.jsonl", "hard": "/home/me/a=b.jsonl"}
    assert parse_config([*words, "--eval_file=./a=b.jsonl"]).evaluation.eval_files == {"": "./a=b.jsonl"}


def test_the_file_is_found_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in REQUIRED.items()))
    assert parse_config(["--config=~/run.yaml"]).run.output_dir == "out"
    assert DataConfig(train_file="~/rows.jsonl").train_file == [f"{tmp_path}/rows.jsonl"]  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["None", "null"])
def test_none_is_not_a_name(word: str) -> None:
    """Scripts write it for what they do not give."""
    words = [f"--{name}={value}" for name, value in REQUIRED.items()]
    optional = ["eval_file", "run_name", "trace", "dataset_config", "resume_from_checkpoint", "attn_implementation"]
    given = [f"--{name}={word}" for name in [*optional, "split", "model_revision", "save_total_limit"]]
    assert parse_config([*words, *given]) == parse_config(words)
    data = ["--model_name_or_path", "a-model", "--output_dir", "out", "--dataset_name", "rows"]
    assert parse_config([*data, "--train_file", word]) == parse_config(data)
    with pytest.raises(LoptError, match="^--output_dir None: of the wrong type; expected a string$"):
        parse_config([*words, f"--output_dir={word}"])
    assert {field.type for name, field in FLAGS.items() if name in optional} == {str | None, list[str] | None}

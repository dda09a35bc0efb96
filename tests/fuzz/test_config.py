"""Command lines and YAML files of every kind: a config that can be used, or a clear error."""

import contextlib
import io
import json
import math
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
from flags import FLAGS
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DEEP, JUNK, contents

from lopt_pp.config.foreign import ROWS
from lopt_pp.config.parser import parse_config
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError

NAMES = [*FLAGS, *ROWS]
REQUIRED = {"model_name_or_path": "a-model", "train_file": "rows.jsonl", "output_dir": "out"}

# What YAML makes of words may be a surprise, or nothing that its tags allow.
WORDS = [
    *["1", "0", "-1", "2", "1.5", "1e-4", "1e400", ".nan", "-.inf", "0x" + "f" * 5000, "9" * 5000, "0o17", "1_000"],
    *["true", "no", "null", "~", "", "''", '"\\0"', '"\\ud800"', "midpoint", "auto", "1,2", "cosine", "lopt", "x=y"],
    *[
        "2001-99-99",
        "2001-01-01",
        "0001-01-01T00:00:00+23:59",
        "12:30:45",
        "[1]",
        "{a: 1}",
        "&a [*a]",
        "*b",
        "!!set {a}",
    ],
    *["!!int x", "!!bool x", "!!float x", "!!timestamp x", "!!binary x", "!!null x", "!!pairs [a]", "!!omap {a: 1}"],
    *["!!python/object/apply:os.system ['exit']", "!x y", "? [a]", "<<: 1", "%", "@", "`", "|", ">", "- 1", "#"],
]
WORD = st.sampled_from(WORDS) | st.text(max_size=8) | JUNK.map(str)


def parsed(arguments: Sequence[str]) -> Config | str:
    """The config, which has been used as a run would; or what is said against it."""
    with mock.patch.dict(os.environ), contextlib.redirect_stdout(io.StringIO()):
        try:
            config = parse_config(arguments)
            json.dumps(config.flags())
            assert timedelta(seconds=config.pipeline.stream_timeout) > timedelta()
            assert all(math.isfinite(rate) for rate in config.optim.rates_of_earlier_stage(0.1))
            Path(config.run.output_dir).exists()
            config.topology(2)
        except LoptError as error:
            assert 0 < len(str(error)) < 2000 + sum(map(len, arguments))
            return str(error)
        except SystemExit as left:
            assert left.code == 0 and any(word.startswith(("-h", "--help")) for word in arguments)
            return "help"
    return config


def flags(given: dict[str, str]) -> list[str]:
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@given(
    st.lists(
        st.sampled_from(NAMES).map(lambda name: f"--{name}")
        | st.tuples(st.sampled_from(NAMES), WORD).map("--%s=%s".__mod__)
        | WORD,
        max_size=6,
    )
)
@example(["--config="])
@example(["--config", "--config"])
@example(["-hx"])
@example(["--learning_rate", "1" + "0" * 400])
@example(["--seed", str(2**70)])
@example(["--stream_timeout", "1e300"])
@example(["--output_dir", ""])
def test_command_lines(words: list[str]) -> None:
    parsed([*flags(REQUIRED), *words])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.yaml"


@given(st.dictionaries(st.sampled_from([*NAMES, "env", "config", "self"]), WORD, max_size=3))
@example({"learning_rate": "1" + "0" * 400})
@example({"max_steps": "0x" + "f" * 5000})
@example({"train_file": '"\\0"'})
@example({"lr_scheduler_type": "&a [*a]"})
def test_files_with_unlikely_values(file: Path, settings: dict[str, str]) -> None:
    text = "".join(f"{name}: {value}\n" for name, value in settings.items())
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    parsed([*flags(REQUIRED), "--config", str(file)])


@given(st.dictionaries(WORD, WORD, max_size=3))
@example({'"A=B"': "x"})
@example({'""': "x"})
@example({"A": '"\\0"'})
@example({"1": "x"})
@example({"A": "&a [*a]"})
def test_environments(file: Path, environment: dict[str, str]) -> None:
    """An environment that is refused is said to be that; one that is not, is there."""
    text = "env:\n" + "".join(f"  {name}: {value}\n" for name, value in environment.items())
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    before = dict(os.environ)
    parsed([*flags(REQUIRED), "--config", str(file)])
    assert dict(os.environ) == before, "the test itself leaks"


@given(contents(b"max_steps: 7\nlearning_rate: 1e-4\nenv:\n  A: b\n") | st.binary(max_size=40))
@example(DEEP.encode())
def test_files_that_are_broken(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    parsed([*flags(REQUIRED), "--config", str(file)])


def test_a_value_that_would_fill_the_memory(file: Path) -> None:
    """Each line has nine times the line before it; only their names are ever in memory, until somebody writes them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    for place in ("learning_rate: *a29", "lr_scheduler_type: *a29", "env: {A: *a29}", "dataset_config: *a29"):
        anchors = "".join(f"  {line}\n" for line in lines)
        # A key that is not a flag may not be in the file, but it may be in a value.
        file.write_text(f"dataset_split:\n{anchors}{place}\n")
        said = parsed([*flags(REQUIRED | {"dataset_split": "train"}), "--config", str(file)])
        assert isinstance(said, str) and len(said) < 300, place
